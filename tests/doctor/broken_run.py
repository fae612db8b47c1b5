"""A healthy run in a folder of its own, and what tests break in it."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from ds_moe.cli import main
from ds_moe.config.run_file import load_run
from ds_moe.doctor.case import Case, Device
from ds_moe.models.presets import preset_config
from ds_moe.models.processor import save_processor, tiny_processor

ZERO3 = {"zero_optimization": {"stage": 3}}
BASE = """\
model:
  preset: tiny-vl-moe
data:
  train: digits
  max_length: 64
moe:
  ep_size: 2
train:
  precision: fp32
  steps: 100
  micro_batch_size: 4
  global_batch_size: 16
deepspeed: zero.json
"""


def doctor(capsys, *arguments: str, world: int = 2) -> tuple[int, list[str], str]:
    """(exit code, lines of errors and warnings, everything printed)."""
    code = main(["doctor", "run.yaml", "--world", str(world), "--samples", "2", *arguments])
    output = capsys.readouterr().out
    return code, [line for line in output.splitlines() if line.startswith(("error", "warning"))], output


def edit(old: str, new: str) -> None:
    text = Path("run.yaml").read_text()
    assert old in text
    Path("run.yaml").write_text(text.replace(old, new))


def packed_rows(tokens: int) -> None:
    edit("micro_batch_size: 4", f"tokens_per_micro_batch: {tokens}")


def zero(**sections) -> None:
    Path("zero.json").write_text(json.dumps({**ZERO3, **sections}, indent=1))


def checkpoint(tensors: dict[str, tuple[int, ...]] | None = None, **text) -> None:
    """A folder `model` with the tiny preset's config (fields of its text model changed), processor and tensors."""
    config = preset_config("tiny-vl-moe")
    for key, value in text.items():
        setattr(config.get_text_config(), key, value)
    config.save_pretrained("model")
    save_processor(tiny_processor("vl"), "model")
    arrays = {name: np.zeros(shape, np.float32) for name, shape in (tensors or {"a": (1,)}).items()}
    save_file(arrays, "model/model.safetensors")
    edit("preset: tiny-vl-moe", "path: model")


def records(*lines: str) -> None:
    """bad/data.jsonl: thirty good records of one image, then `lines`."""
    Path("bad").mkdir()
    Image.new("RGB", (16, 16)).save("bad/gray.png")
    turns = [{"role": "user", "content": "<image>Which digit is this?"}, {"role": "assistant", "content": "7"}]
    good = json.dumps({"messages": turns, "images": ["gray.png"]})
    Path("bad/data.jsonl").write_text("\n".join([*[good] * 30, *lines]) + "\n")
    edit("train: digits", "train: bad/data.jsonl")


def square_in_hub_layout() -> None:
    shapes = {"gate_up_proj": (8, 64, 64), "down_proj": (8, 32, 64)}
    names = {f"model.language_model.layers.0.mlp.experts.{name}": shape for name, shape in shapes.items()}
    checkpoint(names, moe_intermediate_size=32)


def case_of(*overrides: str, **known) -> Case:
    return Case(load_run("run.yaml", list(overrides)), 2, Device(True, 2**33, "test"), samples=2, **known)
