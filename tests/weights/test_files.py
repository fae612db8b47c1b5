"""ds_moe/weights/files.py: against what safetensors does that its manual does not say (`docs/libraries.md`)."""

import stat

import pytest
import torch

from ds_moe.errors import UserError
from ds_moe.weights.files import MappedFiles, write_tensors, write_weights


def test_a_file_that_the_system_refuses_is_named_in_one_line(tmp_path):
    """As a full disk is: safetensors raises an error of its own kind for both."""
    with pytest.raises(UserError, match="model.safetensors cannot be written") as raised:
        write_weights(tmp_path / "missing", [["a"]], lambda key: {key: torch.ones(2)})
    assert "\n" not in str(raised.value)


def test_a_file_has_the_permissions_of_any_other_new_file(tmp_path):
    write_tensors(tmp_path / "weights", {"a": torch.ones(2)})
    (tmp_path / "other").touch()
    assert stat.S_IMODE((tmp_path / "weights").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_a_tensor_without_dimensions_is_read_whole(tmp_path):
    write_tensors(tmp_path / "weights", {"a": torch.tensor(3.0)})
    assert MappedFiles(limit=2**20).read(tmp_path / "weights", "a") == 3
