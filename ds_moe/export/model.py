"""Checkpoint -> plain Hugging Face folder: sharded safetensors, config, processor, generation config, model card.

Reads our checkpoint files tensor by tensor; needs no GPU, no process group and no DeepSpeed.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ds_moe import __version__
from ds_moe.checkpoint.base import base_identity
from ds_moe.checkpoint.files import STATE, Reader, find_checkpoint, read_manifest
from ds_moe.config.rules.model import expert_count, experts_per_token
from ds_moe.config.run_file import load_run
from ds_moe.errors import UserError, shown
from ds_moe.export.lora import MergedReader, write_adapter
from ds_moe.export.stored_form import TRAINING_ONLY, StoredForm, layout_of
from ds_moe.models.card import model_card
from ds_moe.models.convert import EXPERT_BIAS
from ds_moe.models.families import BIAS_SUFFIX
from ds_moe.models.folder import read_model_config
from ds_moe.models.load import build_outline
from ds_moe.models.routing import routing_note
from ds_moe.models.stored_names import CARRIED
from ds_moe.models.ties import ties_of
from ds_moe.weights.files import SHARD_BYTES, check_empty, dtype_name, make_folder, shards, write_tensors, write_weights
from ds_moe.weights.layouts import LAYOUTS, ExpertLayout

Note = Callable[[str], None]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = ("weight/", "buffer/", CARRIED)  # begin the keys of what an export holds


@dataclass(frozen=True)
class Exported:
    """What was written: files with weights, their number of parameters and bytes."""

    folder: Path
    layout: ExpertLayout
    files: list[str]
    parameters: int
    bytes: int


def export_checkpoint(
    source: Path,
    out: Path,
    layout: ExpertLayout | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    note: Note = print,
) -> Exported:
    """Write the model of a checkpoint as a folder that `from_pretrained` of plain transformers loads.

    Args:
        source: a checkpoint folder, or a run's output folder (its newest complete checkpoint is taken).
        out: the folder to write; must not exist or be empty.
        layout: a key of `LAYOUTS`; None: `hub` where it is unambiguous, else `memory`.
        max_shard_bytes: size of one weight file at most (a single larger tensor has a file of its own).
        note: is told where plain transformers routes otherwise than the run.

    Raises:
        UserError: an incomplete checkpoint, a folder in the way, a layout this model cannot be stored in, or a config
            that contradicts the weights.
    """
    checkpoint = find_checkpoint(source)
    check_empty(out)
    state = json.loads((checkpoint / "state.json").read_text())
    config = _model_config(checkpoint)
    layout, dtype = layout_of(config, layout), _dtype(checkpoint, state)
    reader = _reader(checkpoint, state, dtype)
    _check_ties(config, reader, checkpoint)
    routing = routing_note(load_run(str(checkpoint / "run.yaml")).moe, config)
    # Biases that the model has no place for; one of its own is among its buffers, by its name.
    apart = {key: reader.read(key) for key in reader.tensors if key.endswith(BIAS_SUFFIX)}
    form = StoredForm(config, layout)
    keys = [key for key in reader.tensors if key.startswith(KINDS) and key not in apart]
    groups = _groups([key for key in keys if not key.endswith(TRAINING_ONLY)], form)
    sizes = {
        first: sum(math.prod(reader.shape(key)) * dtype.itemsize for key in group) for first, group in groups.items()
    }

    def stored(first: str) -> dict[str, Tensor]:
        tensors = {}
        for key in groups[first]:
            kind, name = key.split("/", 1)
            tensor = reader.read(key)
            if kind == "weight" and tensor.is_floating_point():  # buffers, such as biases, keep their precision
                tensor = tensor.to(dtype)
            tensors[name] = tensor
        return tensors if first.startswith(CARRIED) else form.tensors(tensors)

    make_folder(out)
    for name in map(Path, read_manifest(checkpoint)["files"]):  # no other file that may lie in the folder is copied
        if name.parent == Path("model"):
            shutil.copy(checkpoint / name, out / name.name)
    saved = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(saved | {"dtype": dtype_name(dtype)}, indent=2))
    written = write_weights(out, shards(sizes, max_shard_bytes), stored)
    if apart:
        write_tensors(out / EXPERT_BIAS, {key.split("/", 1)[1]: bias for key, bias in apart.items()})
    about = _origin(checkpoint, state, config.get_text_config(), layout, written.parameters)
    if routing is not None:
        note(f"note: {routing}")
        about += f"\n## Routing\n{routing[0].upper()}{routing[1:]}.\n"
    about += BIAS_NOTE if apart else ""
    (out / "README.md").write_text(model_card(checkpoint.parent.parent.name, config, about))
    return Exported(out, layout, written.files, written.parameters, written.bytes)


def _groups(keys: list[str], form: StoredForm) -> dict[str, list[str]]:
    """First key -> the keys of tensors that are written together, since files hold one tensor of several."""
    of_name = {key.split("/", 1)[1]: key for key in keys if not key.startswith(CARRIED)}
    groups = [[of_name[name] for name in group] for group in form.groups(of_name)]
    return {group[0]: group for group in groups} | {key: [key] for key in keys if key.startswith(CARRIED)}


def export_adapter(source: Path, out: Path, note: Note = print) -> tuple[Path, int]:
    """Write the LoRA of a checkpoint (found as by `export_checkpoint`) as a PEFT adapter; (its folder, parameters).

    Raises:
        UserError: an incomplete checkpoint, a folder in the way, or a run that no adapter can hold.
    """
    checkpoint = find_checkpoint(source)
    check_empty(out)
    state = json.loads((checkpoint / "state.json").read_text())
    config = _model_config(checkpoint)
    parameters = write_adapter(checkpoint, out, _dtype(checkpoint, state), build_outline(config))
    if routing := routing_note(load_run(str(checkpoint / "run.yaml")).moe, config):
        note(f"note: {routing}")
    return out, parameters


def _dtype(checkpoint: Path, state: dict[str, object]) -> torch.dtype:
    if state["precision"] not in DTYPES:
        known = " or ".join(DTYPES)
        raise UserError(f"{checkpoint / STATE}: precision is {shown(state['precision'])}; must be {known}")
    return DTYPES[state["precision"]]


def _model_config(checkpoint: Path) -> PretrainedConfig:
    return read_model_config(checkpoint / "model", str(checkpoint / "model"))


def _reader(checkpoint: Path, state: dict[str, object], dtype: torch.dtype) -> Reader | MergedReader:
    reader = Reader(checkpoint)
    if state.get("base") is None:
        return reader
    config = load_run(str(checkpoint / "run.yaml"))
    if config.lora is None:
        raise UserError(f"{checkpoint} holds no model of its own: ds-moe gate export writes what it holds")
    if base_identity(config) != state["base"]:
        raise UserError(f"{checkpoint}: the model it was trained upon ({config.model.path}) has changed since")
    return MergedReader(reader, config, config.lora, dtype)


def _check_ties(config: PretrainedConfig, reader: Reader | MergedReader, checkpoint: Path) -> None:
    """Refuse two weights that the config ties: vLLM and others would load one of them for both."""
    for pair in ties_of(config).items():
        if all(f"weight/{name}" in reader.tensors for name in pair):
            raise UserError(
                f"{checkpoint}: its config.json has tie_word_embeddings: true, but {' and '.join(pair)} were trained "
                "apart; set it to false in the config.json of model.path, resume the run for a step and export that"
            )


BIAS_NOTE = f"""
The biases by which experts were selected (loss-free balancing) are in `{EXPERT_BIAS}`; ds_moe reads them when
`model.path` is this folder and `moe.balance` has `loss_free`.
"""


def _origin(
    checkpoint: Path, state: dict[str, object], config: PretrainedConfig, layout: ExpertLayout, parameters: int
) -> str:
    experts = expert_count(config)
    about = f"{experts} experts a layer, top-{experts_per_token(config)}" if experts else "dense"
    return f"""\
Trained with ds_moe {__version__} for {state["step"]} optimizer steps on {state["world_size"]} ranks
(expert parallelism {state["ep_size"]}), {state["precision"]}; {parameters:,} parameters, {about}.
Experts are stored in the `{layout}` layout: {LAYOUTS[layout]}.

The run, as it was resolved:

```yaml
{(checkpoint / "run.yaml").read_text().strip()}
```
"""
