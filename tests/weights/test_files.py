"""ds_moe/weights/files.py: what cannot be written is one line."""

import pytest
import torch

from ds_moe.errors import UserError
from ds_moe.weights.files import write_weights


def test_a_file_that_the_system_refuses_is_named_in_one_line(tmp_path):
    """As a full disk is: safetensors raises an error of its own kind for both."""
    with pytest.raises(UserError, match="model.safetensors cannot be written") as raised:
        write_weights(tmp_path / "missing", [["a"]], lambda key: (key, torch.ones(2)))
    assert "\n" not in str(raised.value)
