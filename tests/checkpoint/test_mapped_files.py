"""Files that are read by mapping them do not stay in memory once their tensors are gone."""

from pathlib import Path

import torch
from safetensors import safe_open

from ds_moe.checkpoint import files as checkpoint_files
from ds_moe.checkpoint.files import Reader
from ds_moe.weights import files as weight_files
from ds_moe.weights.files import SafetensorsFiles, write_tensors

VALUES = {f"weight/{number}": torch.full((64, 64), float(number)) for number in range(3)}


def mapped(file):
    return str(file) in Path("/proc/self/maps").read_text()


def test_a_checkpoint_is_let_go_of_after_so_many_bytes(tmp_path, monkeypatch):
    file = tmp_path / "rank-00000.safetensors"
    write_tensors(file, VALUES)
    monkeypatch.setattr(checkpoint_files, "MAPPED", 2 * VALUES["weight/0"].nbytes)
    reader = Reader(tmp_path, {"tensors": {key: [[file.name, 0, 64]] for key in VALUES}})
    for key in ("weight/0", "weight/1"):
        assert torch.equal(reader.read(key), VALUES[key])
    assert mapped(file)
    last = reader.read("weight/2")
    assert mapped(file) and torch.equal(last, VALUES["weight/2"])  # as long as the tensor is there
    del last
    assert not mapped(file)
    assert torch.equal(reader.read("weight/1"), VALUES["weight/1"])


def test_weights_are_let_go_of_after_so_many_bytes_and_at_the_end(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    write_tensors(file, VALUES)
    files = SafetensorsFiles.of_folder(tmp_path)
    assert not mapped(file)
    for key, value in VALUES.items():
        assert torch.equal(files.read(key, 3, 9), value[3:9]) and mapped(file)
    assert files.bytes_read == 3 * 6 * 64 * 4
    files.close()
    assert not mapped(file)
    monkeypatch.setattr(weight_files, "MAPPED", 0)
    files, opened = SafetensorsFiles.of_folder(tmp_path), []
    monkeypatch.setattr(weight_files, "safe_open", lambda *args, **kw: opened.append(args) or safe_open(*args, **kw))
    for _ in range(3):
        assert torch.equal(files.read("weight/1"), VALUES["weight/1"])
    assert len(opened) == 3
