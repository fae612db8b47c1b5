"""A config that ties two weights which the files hold both, from load to export."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ds_moe.checkpoint.files import MANIFEST
from ds_moe.errors import UserError
from ds_moe.export.model import export_checkpoint
from ds_moe.models.processor import save_processor, tiny_processor
from ds_moe.weights.files import SafetensorsFiles
from tests.launcher import run_ranks
from tests.models.streamed import HEAD, tied_folder

MESSAGES = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "north"}]


def trained(folder: Path, stored: str) -> Path:
    """The output folder of two steps, ZeRO-3 on two ranks, from a tied model whose file holds the head as `stored`."""
    model = tied_folder(folder / "model", "tiny-moe", stored)
    save_processor(tiny_processor("text"), model)
    (folder / "qa.jsonl").write_text((json.dumps({"messages": MESSAGES}) + "\n") * 4)
    run = {
        "model": {"path": str(model)},
        "data": {"train": str(folder / "qa.jsonl"), "max_length": 64},
        "moe": {"ep_size": 2},
        "train": {"output_dir": str(folder / "out"), "precision": "fp32", "steps": 2, "lr": 0.01}
        | {"micro_batch_size": 2, "global_batch_size": 4},
        "monitor": {"tensorboard": False},
        "deepspeed": str(Path("ds_configs/zero3.json").resolve()),
    }
    (folder / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
    run_ranks("ds_moe.train", 2, [str(folder / "run.yaml")])
    return folder / "out"


@pytest.mark.slow
def test_an_equal_head_is_trained_and_exported_once(tmp_path):
    export_checkpoint(trained(tmp_path, "equal"), tmp_path / "export")
    before, after = (SafetensorsFiles.of_folder(tmp_path / name) for name in ("model", "export"))
    assert HEAD in before.shapes and HEAD not in after.shapes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.get_input_embeddings().weight
    assert not torch.equal(model.lm_head.weight, before.read(HEAD))  # it was trained


@pytest.mark.slow
def test_another_head_stays_apart_and_the_config_says_so(tmp_path):
    output = trained(tmp_path, "other")
    export_checkpoint(output, tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, SafetensorsFiles.of_folder(tmp_path / "export").read(HEAD))

    config = output / "checkpoints/step_00000002/model/config.json"  # as versions before this test wrote it
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    manifest = json.loads((config.parents[1] / MANIFEST).read_text())
    manifest["files"]["model/config.json"] = {
        "size": config.stat().st_size,
        "sha256": hashlib.sha256(config.read_bytes()).hexdigest(),
    }
    (config.parents[1] / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"tie_word_embeddings: true, but lm_head.weight and model.embed_tokens.weight"):
        export_checkpoint(output, tmp_path / "again")
