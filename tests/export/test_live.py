"""Folders of weights for an engine that follows a training, of one process."""

import json

import pytest
import torch

from ds_moe.config.run_file import load_run
from ds_moe.distributed import Topology
from ds_moe.errors import UserError
from ds_moe.export import live
from ds_moe.export.live import LiveExport, folder_bytes
from ds_moe.models.convert import convert
from ds_moe.models.lora import add_lora
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import tiny_processor
from ds_moe.weights.files import SafetensorsFiles

LORA = "lora={rank: 4, targets: [q_proj], alpha: 4}"


def exported(model, overrides, dtype, folder):
    config = load_run("tests/runs/online.yaml", ["model={preset: tiny-moe}", "moe.ep_size=1", *overrides])
    topology = Topology(0, 1, 0, 1, torch.device("cpu"))
    LiveExport(model, topology, config, tiny_processor("text"), dtype).write(folder)
    files = SafetensorsFiles.of_folder(folder)
    assert folder_bytes(model, 1, dtype) == sum(files.read(name).nbytes for name in files.shapes)
    return files


def test_a_small_update_of_a_bf16_base_is_in_a_folder_in_fp32(tmp_path):
    """It is below what bf16 resolves: what is rounded to the base's dtype first has lost it."""
    config = load_run("tests/runs/online.yaml", ["model={preset: tiny-moe}", "moe.ep_size=1", LORA])
    model = build_preset("tiny-moe").to(torch.bfloat16)
    convert(model, config.moe)
    add_lora(model, config.lora, 0)
    name = next(name for name, _ in model.named_parameters() if ".lora_B." in name)
    base = dict(model.named_parameters())
    for key, parameter in base.items():
        if ".lora_B." in key:
            torch.nn.init.constant_(parameter, 1e-4)
    files = exported(model, [LORA], torch.float32, tmp_path / "step_1")
    stored = name.replace("base_model.model.", "").replace(".lora_B.default", "")
    weight = next(value for key, value in base.items() if key.endswith("base_layer.weight") and "q_proj" in key)
    a, b = (next(value for key, value in base.items() if f".lora_{half}." in key) for half in "AB")
    expected = weight.float() + b.float() @ a.float()
    assert torch.equal(files.read(stored), expected.detach()) and not torch.equal(expected, weight.float())


def test_full_files_are_written_on_the_way_and_a_folder_takes_the_place_of_another(tmp_path, monkeypatch):
    model = build_preset("tiny-moe").to(torch.bfloat16)
    whole = exported(model, [], torch.bfloat16, tmp_path / "step_1")
    monkeypatch.setattr(live, "FILE_BYTES", 2**14)
    (tmp_path / "many/.partial_step_2").mkdir(parents=True)  # of a process that was killed
    for shift in (1.0, 0.0):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += shift  # a folder of other weights, which the next replaces
        if not shift:
            model = build_preset("tiny-moe").to(torch.bfloat16)
        many = exported(model, [], torch.bfloat16, tmp_path / "many/step_2")
    index = json.loads((tmp_path / "many/step_2/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and set(index["weight_map"]) == set(many.shapes)
    assert all(torch.equal(many.read(name), whole.read(name)) for name in whole.shapes)
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["step_2"]
    assert json.loads((tmp_path / "many/step_2/config.json").read_text())["dtype"] == "bfloat16"


def test_weights_that_an_engine_would_tie_are_refused(tmp_path):
    model = build_preset("tiny-moe")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    with pytest.raises(UserError, match="config.json has tie_word_embeddings: true, but .* are trained apart"):
        exported(model, [], torch.float32, tmp_path / "step_1")
    assert not (tmp_path / "step_1").exists()
