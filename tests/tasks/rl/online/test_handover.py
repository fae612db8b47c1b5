"""Whose folder of weights it is."""

import pytest

from ds_moe.errors import UserError
from ds_moe.tasks.rl.online.handover import claim


def test_a_folder_of_weights_is_one_run_s(tmp_path):
    """Versions in it are replaced and removed, and have the names of checkpoints."""
    folder = tmp_path / "shared/weights"
    claim(folder, "runs/a")
    (folder / "step_00000002").mkdir()
    claim(folder, "runs/a")
    with pytest.raises(UserError, match="weights has the weights of runs/a: .* needs a folder that holds nothing else"):
        claim(folder, "runs/b")
    (tmp_path / "checkpoints/step_00000002").mkdir(parents=True)
    with pytest.raises(UserError, match="checkpoints holds step_00000002, and no weights of this run"):
        claim(tmp_path / "checkpoints", "runs/a")
    assert (tmp_path / "checkpoints/step_00000002").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be used for weights: File exists"):
        claim(tmp_path / "file", "runs/a")
