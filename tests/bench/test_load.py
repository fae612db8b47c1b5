"""The benchmark of loading: its checkpoint is one of the hub, both ways of loading agree, figures are told apart."""

import json

import pytest
import torch

from ds_moe.config.sections import ModelConfig
from ds_moe.models.load import load_model
from ds_moe.weights.files import SafetensorsFiles
from tools.bench.load import bench as bench_load

SMALL = {"hidden_size": 64, "moe_intermediate_size": 48, "num_experts": 8, "vocab_size": 512}
MIB = 2**20


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench_load, "TEXT", bench_load.TEXT | SMALL)
    monkeypatch.setattr(bench_load, "FILE_BYTES", MIB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checkpoint_has_its_size_several_files_and_transposed_experts(small, dtype, tmp_path):
    size, files = bench_load.write_checkpoint(tmp_path / "model", 4 * MIB, dtype)
    assert size == pytest.approx(4 * MIB, rel=0.15) and files > 2
    shapes = SafetensorsFiles.find(str(tmp_path / "model")).shapes
    assert shapes["model.language_model.layers.0.mlp.experts.gate_up_proj"] == (8, 64, 96)
    model = load_model(ModelConfig(path=str(tmp_path / "model")), dtype)
    assert sum(parameter.nbytes for parameter in model.parameters()) == size
    again, _ = bench_load.write_checkpoint(tmp_path / "again", 4 * MIB, dtype)
    other = load_model(ModelConfig(path=str(tmp_path / "again")), dtype)
    assert again == size and all(map(torch.equal, model.parameters(), other.parameters()))


def test_what_there_is_no_memory_for_is_left_out(small, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_load, "LIBRARIES", 1e9)
    monkeypatch.setattr(bench_load, "launch", lambda plan, folder: pytest.fail("started"))
    file = tmp_path / "new/load.json"
    options = ["--size", "0.004", "--trained", "router_only", "--json", str(file), "--folder", str(tmp_path)]
    assert bench_load.main(options) == 0
    [run] = json.loads(file.read_text())["runs"]
    assert run["results"] == [] and len(run["left_out"]) == 2
    assert capsys.readouterr().out.count("left out: ") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["new"]  # the checkpoint is gone


def test_another_loss_is_an_error(small, monkeypatch, capsys, tmp_path):
    losses = iter((1.0, 1.0 + 1e-7))
    figures = dict.fromkeys(("imported", "loaded", "loaded_anonymous", "built", "built_anonymous", "read"), MIB)
    rank = {f"{name}_bytes": size for name, size in figures.items()} | {"loaded_s": 1.0, "built_s": 2.0}
    found = {"environment": {}}
    monkeypatch.setattr(bench_load, "launch", lambda *_: found | {"ranks": [rank | {"loss": next(losses)}]})
    assert bench_load.main(["--size", "0.004", "--trained", "router_only", "--folder", str(tmp_path)]) == 1
    assert "do not give the same loss" in capsys.readouterr().err


@pytest.mark.slow
def test_real_ranks_find_the_same_loss_and_a_smaller_peak(small, monkeypatch, tmp_path):
    wider = {"hidden_size": 256, "moe_intermediate_size": 192, "num_experts": 16}  # or there are very many layers
    monkeypatch.setattr(bench_load, "TEXT", bench_load.TEXT | wider)
    monkeypatch.setattr(bench_load, "FILE_BYTES", 64 * MIB)
    file = tmp_path / "load.json"
    options = ["--size", "0.5", "--trained", "router_only", "--json", str(file), "--folder", str(tmp_path)]
    assert bench_load.main(options) == 0
    [run] = json.loads(file.read_text())["runs"]
    streamed, complete = run["results"]
    assert run["same_loss"] and 0.4 < streamed["read_bytes"] / run["model_bytes"] < 0.6
    assert streamed["loaded_bytes"] - streamed["imported_bytes"] < 0.8 * run["model_bytes"]
    assert streamed["built_bytes"] < complete["built_bytes"]
