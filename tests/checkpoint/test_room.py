"""What a checkpoint takes is known before it is written, and what the disk lacks is said before anything is written."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ds_moe.checkpoint import room, save
from ds_moe.checkpoint.files import file_table, read_manifest
from ds_moe.checkpoint.host_copy import HostCopy
from ds_moe.config.sections import ModelConfig
from ds_moe.distributed import Topology
from ds_moe.errors import UserError
from ds_moe.models.load import build_outline, model_config
from ds_moe.models.presets import build_preset, preset_config
from ds_moe.models.stored_names import Carried
from ds_moe.training.checkpoints import read_carried
from ds_moe.weights.files import MappedFiles, SafetensorsFiles

Disk = namedtuple("Disk", "total used free")
KEPT = Path(__file__).parents[1] / "kept/e49d3ff/output/checkpoints"


def test_the_size_is_that_of_a_checkpoint_that_was_written():
    """Of two ranks, EP 2, all of it trained; the run is in tests/kept."""
    [path] = KEPT.glob("step_*")
    files = read_manifest(path)["files"]
    written = sum(entry["size"] for name, entry in files.items() if name.startswith("rank-"))
    shapes = {key for key in read_manifest(path)["tensors"] if key.startswith("weight/")}
    model = build_outline(model_config(ModelConfig(path=str(KEPT.parents[1] / "model"))))
    assert {f"weight/{name}" for name, _ in model.named_parameters()} == shapes
    size = room.checkpoint_bytes(model, 1, with_frozen=True)
    assert size <= written <= 1.2 * size  # headers of files, which are long beside the tensors of a tiny model


def test_frozen_parts_count_as_they_are_saved():
    model = torch.nn.Linear(5, 3).bfloat16()
    model.bias.requires_grad_(False)
    assert room.checkpoint_bytes(model, 1, with_frozen=False) == 12 * 15
    assert room.checkpoint_bytes(model, 1, with_frozen=True) == 12 * 15 + 2 * 3
    assert room.checkpoint_bytes(model, 1, with_frozen=True, frozen_width=4) == 12 * 15 + 4 * 3
    assert room.checkpoint_bytes(model, 1, with_frozen=False, by_muon={"weight"}) == 8 * 15


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(0, 0, 100 * 10**9 if path == tmp_path else 0))
    folder = tmp_path / "run/checkpoints"
    assert room.no_room(folder, 100 * 10**9) is None
    expected = f"{folder}: a checkpoint takes 372 GB, 100 GB are free; free some, or choose another folder"
    assert room.no_room(folder, 372 * 10**9) == expected
    assert room.outlook(folder, 40 * 10**9, 2).startswith("40 GB each, 2 kept beside the one that is written: 120 GB;")
    assert room.soon_full(folder, 40 * 10**9, 2) and not room.soon_full(folder, 33 * 10**9, 2)
    (tmp_path / "run/checkpoints/step_00000001").mkdir(parents=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(0, 0, 100 * 10**9))
    assert not room.soon_full(folder, 40 * 10**9, 2)  # one of the three is there already


def test_without_room_no_folder_is_made_and_what_a_killed_run_left_is_gone(tmp_path, monkeypatch):
    saving, left = save.Saving.__new__(save.Saving), tmp_path / f"{save.PARTIAL}step_00000001"
    saving.folder, saving.partial = tmp_path, tmp_path / f"{save.PARTIAL}step_00000002"
    left.mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(0, 0, 99 if left.exists() else 100))
    assert "a checkpoint takes 0.101 kB, 0.1 kB are free" in saving._prepare(101)
    assert list(tmp_path.iterdir()) == []
    left.mkdir()
    assert saving._prepare(100) is None  # the leftovers took that room
    assert list(tmp_path.iterdir()) == [saving.partial]


SPECULATION = {"mtp.fc.weight": torch.randn(3, 5).bfloat16(), "mtp.norm.weight": torch.randn(7)}


def test_what_the_model_does_not_use_is_counted_and_never_dropped_in_silence(tmp_path):
    build_preset("tiny-qwen3.5-moe").save_pretrained(tmp_path)
    save_file(SPECULATION, tmp_path / "other.safetensors")
    outline = build_outline(preset_config("tiny-qwen3.5-moe"))
    files = [tmp_path / "model.safetensors", tmp_path / "other.safetensors"]
    carried, ranks = Carried(outline, SafetensorsFiles(files, lambda *of: str(of))), []
    assert carried.names == sorted(SPECULATION) and carried.nbytes == 3 * 5 * 2 + 7 * 4
    for rank in range(3):
        ranks.append(read_carried(carried, Topology(rank, 3, rank, 1, torch.device("cpu")), "base"))
    assert [sorted(one) for one in ranks] == [["mtp.fc.weight"], ["mtp.norm.weight"], []]
    assert all(torch.equal(value, SPECULATION[name]) for one in ranks for name, value in one.items())
    (tmp_path / "other.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"^rank 0 could not read mtp\.fc\.weight .* model\.path 'base'.*No such file"
    ) as caught:
        read_carried(carried, Topology(0, 1, 0, 1, torch.device("cpu")), "base")
    assert "\n" not in str(caught.value)
    nothing = Carried(outline, None)
    assert nothing.names == [] and nothing.nbytes == 0 and nothing.share(0, 1) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1000,)])
def test_values_pass_through_small_buffers_unchanged(dtype, shape):
    copy, value = HostCopy(torch.device("cpu"), chunk=64), torch.randn(shape).mul(100).to(dtype)
    for given in (value, value.expand(2, *shape).transpose(0, -1)):
        there = copy(given)
        assert torch.equal(there, given) and there.is_contiguous() and there.dtype == dtype
        assert there.numel() == 0 or there.data_ptr() != given.data_ptr()


@pytest.mark.gpu
def test_values_of_a_gpu_pass_through_small_buffers_unchanged():
    copy = HostCopy(torch.device("cuda"), chunk=2**16)
    for _ in range(20):
        value = torch.randn(300_001, device="cuda")
        assert torch.equal(copy(value), value.cpu())


def test_a_rank_with_much_writes_several_files_and_their_sums_are_right(tmp_path, monkeypatch):
    tensors = {f"weight/{number}": (torch.randn(8, 8), [0, 8]) for number in range(5)}
    expected = {key: value.clone() for key, (value, _) in tensors.items()}
    monkeypatch.setattr(save, "FILE_BYTES", 2 * 8 * 8 * 4)
    share = save._write_rank(tmp_path, 1, dict(tensors), {"cpu": torch.get_rng_state()})
    names = [f"rank-00001-{number:03d}.safetensors" for number in range(3)]
    assert sorted(share.files) == [*names, "rng-00001.safetensors"]
    assert share.files == file_table(tmp_path, sorted(tmp_path.iterdir()))
    reader = MappedFiles(2**20)
    for key, (file, *rows) in share.pieces.items():
        assert rows == [0, 8] and torch.equal(reader.read(tmp_path / file, key), expected[key])
