"""Checks that need the model's config, and of its weights the headers only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ds_moe.config.check import model_problems
from ds_moe.config.rules.model import expert_count, experts_per_token
from ds_moe.doctor.case import Case, Finding
from ds_moe.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Tokens that an expert can expect to see: with fewer in an optimizer step its gradient is mostly noise, and with fewer
# in the whole run it hardly changes.
LEAST_TOKENS_A_STEP = 16
LEAST_TOKENS_A_RUN = 512
LINEAR_KERNELS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}  # module -> package
SLOW_EXPERTS = {"batched_mm": "about 100 times slower than grouped_mm", "eager": "a loop over the experts"}


def find_model(case: Case) -> Iterator[Finding]:
    """Read the model's config; sets `case.model`, and `case.folder` for a checkpoint."""
    from ds_moe.models.attention import check_packable
    from ds_moe.models.families import FAMILIES, unsupported
    from ds_moe.models.folder import read_model_config
    from ds_moe.models.presets import preset_config

    config, preset, path = case.config, case.config.model.preset, case.config.model.path
    if (preset is None) == (path is None):
        return  # already a finding
    where = config.at("model.path" if preset is None else "model.preset")
    try:
        if preset is not None:
            found = preset_config(preset)
        else:
            case.folder = _local_folder(path)
            if case.folder is None:
                text = f"model.path {path} is not on this machine, so the model, its memory and the records' length"
                yield Finding("warning", f"{where}: {text} were not checked; fetch it first: hf download {path}")
                return
            found = read_model_config(path, f"model.path {path}", offline=True)
    except UserError as error:
        yield Finding("error", f"{where}: {error}")
        return
    if found.model_type not in FAMILIES:
        text = f"model.path {path}: model_type {found.model_type!r} {unsupported(found.model_type)}"
        yield Finding("error", f"{where}: {text}")
        return
    case.experts = expert_count(found)
    complaints = model_problems(config, found, case.world_size)
    try:
        check_packable(config, found)
    except UserError as error:
        complaints = [*complaints, str(error)]
    yield from (Finding("error", complaint) for complaint in complaints)
    case.model = None if complaints else found


def _local_folder(path: str) -> str | None:
    """The folder of a checkpoint: `path` itself or its copy in the Hugging Face cache; None where it is in neither."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(path).is_dir():
        return path
    try:
        return snapshot_download(path, local_files_only=True)
    except HFValidationError as error:
        raise UserError(f"model.path {path} is no folder and no hub id (name/model)") from error
    except LocalEntryNotFoundError as error:
        if path.startswith((".", "~")) or "/" not in path:
            raise UserError(f"model.path {path} is no folder and no hub id (name/model)") from error
        return None


def check_files(case: Case) -> Iterator[Finding]:
    """Weights of a checkpoint folder: all shards there and readable, and in which layout the experts lie."""
    if case.folder is None or case.model is None:
        return
    from ds_moe.models.families import family_of
    from ds_moe.weights.files import INDEX, WEIGHTS, SafetensorsFiles

    folder, where = Path(case.folder), case.config.at("model.path")
    try:
        case.files = SafetensorsFiles.of_folder(folder)
    except UserError as error:
        yield Finding("error", f"{where}: {error}")
        return
    if (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        text = f"{folder} holds {WEIGHTS} and {INDEX}: the first is read, as transformers does; remove what is stale"
        yield Finding("warning", f"{where}: {text}")
    layout, square = "memory layout or that of its hub", None
    if family_of(case.model).measured:
        layout, square = _expert_layout(case.files.shapes, case.model.get_text_config())
    if square and layout == "hub layout":
        fix = "transformers would load them untransposed; convert the checkpoint to memory layout"
        yield Finding("error", f"{where}: {square} and in hub layout: {fix}")
        return
    if square:
        yield Finding("warning", f"{where}: {square}: export with --layout memory, a hub layout loads wrongly")
    yield Finding("ok", f"weights: {len(case.files.shapes)} tensors in {folder}, {layout}")


def _expert_layout(shapes: dict[str, tuple[int, ...]], text: PretrainedConfig) -> tuple[str, str | None]:
    """How experts are stored, and why transformers would not notice that they are transposed, if it would not.

    transformers goes by shapes, which do not tell where one of the two matrices of an expert is square; the other
    matrix does tell.
    """
    down = next((shape for name, shape in shapes.items() if name.endswith("experts.down_proj")), None)
    if down is None:
        return ("one tensor an expert" if expert_count(text) else "no experts"), None
    hidden, width = text.hidden_size, text.moe_intermediate_size
    if hidden == width:
        up = next((shape for name, shape in shapes.items() if name.endswith("experts.gate_up_proj")), (0, 2 * width))
        layout = "hub layout" if up[1] == hidden else "memory layout"
        return layout, f"experts are square (hidden_size {hidden} = moe_intermediate_size)"
    square = f"experts are square (hidden_size {hidden} = 2 x {width})" if hidden == 2 * width else None
    return ("hub layout" if down[1] == width else "memory layout"), square


def check_experts(case: Case) -> Iterator[Finding]:
    """How experts are computed, and whether they see enough tokens to learn anything."""
    config, experts = case.config, expert_count(case.model) if case.model else None
    from ds_moe.models.freeze import trained_experts

    if case.folder is not None and case.model is not None:
        yield from _slow_implementation(Path(case.folder) / "config.json")
    if case.model is None or config.moe is None or experts is None or case.tokens_a_sample is None:
        return
    if case.outline is not None and not trained_experts(case.outline):
        return  # frozen experts need no tokens to learn from
    top_k = config.moe.router.top_k or experts_per_token(case.model)
    step = config.train.global_batch_size * case.tokens_a_sample * top_k / experts
    text = f"an expert sees about {step:.0f} tokens a step ({experts} experts, top {top_k})"
    if step < LEAST_TOKENS_A_STEP:
        fix = f"fewer than {LEAST_TOKENS_A_STEP} barely train it; raise train.global_batch_size"
        yield Finding("warning", f"{config.at('train.global_batch_size')}: {text}; {fix}")
    elif case.steps is not None and step * case.steps < LEAST_TOKENS_A_RUN:
        fix = f"{step * case.steps:.0f} in the whole run, which leave it untrained; train longer or on more data"
        yield Finding("warning", f"{config.at('train.steps')}: {text}, {fix}")
    else:
        yield Finding("ok", f"experts: {text}")


def check_linear_attention(case: Case) -> Iterator[Finding]:
    """Packages with kernels for layers with linear attention. Without them transformers computes these in PyTorch."""
    if case.model is None or case.device.on_cpu:  # the kernels are for accelerators
        return
    kinds = list(getattr(case.model.get_text_config(), "layer_types", None) or ())
    linear = kinds.count("linear_attention")
    missing = [name for module, name in LINEAR_KERNELS.items() if find_spec(module) is None]
    if linear and missing:
        text = f"{linear} of {len(kinds)} layers have linear attention; {' and '.join(missing)} cannot be imported here"
        cost = "transformers then computes them in PyTorch, chunk by chunk in fp32: right, but much slower and larger"
        fix = f"pip install {' '.join(missing)} where the job runs"
        yield Finding("warning", f"{case.config.at('model')}: {text}; {cost}; {fix}")


def check_routing(case: Case) -> Iterator[Finding]:
    """Where an export of this run would be routed otherwise by plain transformers."""
    from ds_moe.models.routing import routing_note

    if case.model is not None and (note := routing_note(case.config.moe, case.model)):
        yield Finding("warning", f"{case.config.at('moe')}: {note}")


def _slow_implementation(file: Path) -> Iterator[Finding]:
    """A config.json that makes plain transformers compute experts slowly, after an export too."""
    values = json.loads(file.read_text())
    for holder in (values, values.get("text_config") or {}):
        kind = holder.get("experts_implementation", holder.get("_experts_implementation"))
        if kind in SLOW_EXPERTS:
            text = f"experts_implementation is {kind}, {SLOW_EXPERTS[kind]}, in evaluation with plain transformers"
            yield Finding("warning", f"{file}: {text}; remove the key")
            return
