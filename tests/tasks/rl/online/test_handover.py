"""The folder of weights: whose it is, and what has room there."""

from types import SimpleNamespace

import pytest

from ds_moe.checkpoint import room
from ds_moe.errors import UserError
from ds_moe.tasks.rl.online.handover import claim, no_room_for_weights


def test_a_folder_of_weights_is_one_run_s(tmp_path):
    """Versions in it are replaced and removed, and have the names of checkpoints."""
    folder = tmp_path / "shared/weights"
    claim(folder, "runs/a")
    (folder / "step_00000002").mkdir()
    claim(folder, "runs/a")
    with pytest.raises(
        UserError, match="weights_dir .*weights has the weights of runs/a; choose a folder that holds nothing"
    ):
        claim(folder, "runs/b")
    (tmp_path / "checkpoints/step_00000002").mkdir(parents=True)
    with pytest.raises(UserError, match="weights_dir .*checkpoints holds step_00000002, and no weights of this run"):
        claim(tmp_path / "checkpoints", "runs/a")
    assert (tmp_path / "checkpoints/step_00000002").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"rl.engine.weights_dir .*file cannot be written \(File exists\)"):
        claim(tmp_path / "file", "runs/a")


def test_versions_of_weights_need_room(tmp_path, monkeypatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=35 * 10**9))
    assert no_room_for_weights(tmp_path, 10 * 10**9, lag=0) is None  # two are kept, one is written
    assert no_room_for_weights(tmp_path, 10 * 10**9, lag=1) is None
    text = "4 versions of weights take 10 GB each, 35 GB are free; free some, or choose another folder"
    assert no_room_for_weights(tmp_path, 10 * 10**9, lag=2) == f"rl.engine.weights_dir {tmp_path}: {text}"
    (tmp_path / "step_00000002").mkdir()
    assert no_room_for_weights(tmp_path, 10 * 10**9, lag=2) is None  # one of them is there
