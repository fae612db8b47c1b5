"""A checkpoint as `ds_moe.checkpoint.save` writes it, without a training run."""

import json
import shutil
from pathlib import Path

import torch

from ds_moe.checkpoint.files import FORMAT, MANIFEST, STATE, file_table, write_json
from ds_moe.config.moe import MoEConfig
from ds_moe.models.convert import convert
from ds_moe.models.families import FAMILIES, PRESETS
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import save_processor, tiny_processor
from ds_moe.weights.files import write_tensors

RANK, RNG = "rank-00000.safetensors", "rng-00000.safetensors"
ZERO3 = Path(__file__).parents[1] / "ds_configs/zero3.json"
ABOUT = {"step": 4, "adam_step": 0, "world_size": 1, "ep_size": 1, "precision": "fp32", "data": {}, "result": {}}


def save_untrained(run: Path, preset: str, sections: str = "", moe: dict | None = None, **state: object) -> Path:
    """Write step 4 of a run of one rank with the weights of `preset`; returns the checkpoint.

    Args:
        run: its output folder.
        sections: YAML that its run file has beside `model`, `data`, `train` and `deepspeed`.
        moe: the same section `moe` as `sections` has, if they have one.
        state: what `state.json` has in place of `ABOUT`.
    """
    folder = run / "checkpoints" / "step_00000004"
    folder.mkdir(parents=True)
    model = build_preset(preset)
    if moe is not None:
        convert(model, MoEConfig.model_validate(moe))
    tensors = {f"weight/{name}": one.detach().contiguous() for name, one in model.named_parameters()}
    tensors |= {f"buffer/{name}": one for name, one in model.named_buffers() if name.endswith("bias_E")}
    write_tensors(folder / RANK, tensors)
    write_tensors(folder / RNG, {"cpu": torch.get_rng_state()})
    write_json(folder / STATE, ABOUT | state)
    data = "digits" if FAMILIES[PRESETS[preset]].vision else "data.jsonl"
    text = f"model: {{preset: {preset}}}\ndata: {{train: {data}}}\ntrain: {{steps: 4, output_dir: run}}\n"
    (folder / "run.yaml").write_text(f"{text}deepspeed: deepspeed.json\n{sections}")
    shutil.copy(ZERO3, folder / "deepspeed.json")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder / "model")
    model.generation_config.save_pretrained(folder / "model")
    save_processor(tiny_processor("vl" if data == "digits" else "text"), folder / "model")
    seal(folder, **{key: [[RANK, 0, len(value)]] for key, value in tensors.items()})
    return folder


def seal(folder: Path, files: dict | None = None, **tensors: object) -> None:
    """Write the manifest anew, as whoever changed the files would; `files` and `tensors` are added to the true ones."""
    old = json.loads((folder / MANIFEST).read_text())["tensors"] if (folder / MANIFEST).is_file() else {}
    found = [file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST]
    known = file_table(folder, found) | (files or {})
    write_json(folder / MANIFEST, {"format": FORMAT, "files": known, "tensors": old | tensors})
