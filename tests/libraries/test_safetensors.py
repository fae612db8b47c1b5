"""What safetensors does that a reader of its manual would not expect. A failing test here means that a guard may go.

`docs/libraries.md` lists them all.
"""

import stat

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

ONE = {"a": torch.ones(2)}


def test_a_file_is_readable_by_its_owner_alone(tmp_path):
    """Guard: `write_tensors` of weights/files.py."""
    save_file(ONE, tmp_path / "file")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def test_a_path_is_replaced_not_written_through(tmp_path):
    """Relied on: a link in an output folder never leads a write elsewhere. The file is made beside it and renamed."""
    (tmp_path / "target").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    save_file(ONE, tmp_path / "link")
    assert (tmp_path / "target").read_text() == "kept" and not (tmp_path / "link").is_symlink()


def test_what_the_system_refuses_is_no_os_error(tmp_path):
    """Guard: `write_weights` of weights/files.py. A full disk raises the same."""
    with pytest.raises(SafetensorError, match="os error 2"):
        save_file(ONE, tmp_path / "missing" / "file")
    assert not issubclass(SafetensorError, OSError | RuntimeError)


def test_tensors_with_strides_are_refused(tmp_path):
    """Guard: `write_weights` of weights/files.py makes them contiguous."""
    with pytest.raises(ValueError, match="non contiguous"):
        save_file({"a": torch.ones(2, 3).T}, tmp_path / "file")


def test_a_tensor_without_dimensions_has_no_slice(tmp_path):
    """Guard: `MappedFiles.read` of weights/files.py."""
    save_file({"a": torch.tensor(3.0)}, tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file, pytest.raises(IndexError, match="0-dim"):
        file.get_slice("a")[0:1]


def test_a_tensor_is_a_view_of_its_file(tmp_path):
    """Guards: `MappedFiles` of weights/files.py lets go of files, `read_adapter` of tasks/gate/adapters.py copies."""
    path = tmp_path / "file"
    save_file({"a": torch.ones(4)}, path)
    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor("a")
    with path.open("r+b") as file:
        file.seek(-16, 2)
        file.write(bytes(16))
    assert not tensor.any()
