"""Folders of weights for an engine that follows a training, of one process."""

import pytest
import torch

from ds_moe.config.run_file import load_run
from ds_moe.distributed import Topology
from ds_moe.export.live import LiveExport, folder_bytes
from ds_moe.models.convert import convert
from ds_moe.models.lora import add_lora
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import tiny_processor
from ds_moe.weights.files import SafetensorsFiles

LORA = "lora={rank: 4, targets: [q_proj], alpha: 4}"


@pytest.fixture(scope="module")
def plain():
    return build_preset("tiny-moe")


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
