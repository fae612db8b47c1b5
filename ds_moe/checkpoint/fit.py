"""Whether a run can go on from a checkpoint: asked by every run that resumes, and beforehand by the doctor.

Reads manifests, states and the headers of files, no tensor; needs no DeepSpeed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ds_moe.checkpoint.changes import changed_keys, other_updates
from ds_moe.checkpoint.files import STATE, Reader
from ds_moe.config.run import RunConfig
from ds_moe.config.run_file import load_run
from ds_moe.data.position import DataPosition, position_problems, same_file
from ds_moe.errors import UserError
from ds_moe.models.families import full_shape
from ds_moe.models.lora import update_of
from ds_moe.models.matrices import ADAM_MOMENTS, by_muon

MODEL = ("weight/", "buffer/")  # begin the keys of a model's tensors; those of moments begin otherwise
NAMED = 5  # parameters that a message names
OTHER_FOLDER = "choose another train.output_dir"
START_ANEW = f"{OTHER_FOLDER}, and begin from an export of it (model.path)"
KEEP_MUON = f"leave train.optimizer muon, or {START_ANEW}"


def chosen(
    resume: str,
    folder: Path,
    existing: list[Path],
    problem: Callable[[Path], str | None],
    note: Callable[[str], None] = print,
) -> Path | None:
    """The checkpoint that `train.resume` (auto, never, or a folder) names; None for a new start.

    `auto` passes over checkpoints with a problem, but never makes a new start in a folder that holds checkpoints; and
    no run ever continues before later checkpoints of another run.

    Args:
        folder: `<output_dir>/checkpoints`; `existing` are the checkpoints in it, newest first.
        problem: says why a checkpoint cannot be used; `note` is told of those that are passed over.

    Raises:
        UserError: none of the checkpoints is usable, or there are checkpoints that the run would write between.
    """
    if resume == "never" and existing:
        raise UserError(f"train.resume=never, but {folder} holds {existing[0].name}: {OTHER_FOLDER}")
    if resume not in ("never", "auto") and not Path(resume).is_dir():
        raise UserError(f"train.resume is {resume!r}; must be auto, never or a checkpoint folder")
    candidates = {"never": [], "auto": existing}.get(resume, [Path(resume)])
    for path in candidates:
        if (found := problem(path)) is not None:
            note(f"checkpoint {path} cannot be used: {found}")
            continue
        later = [other.name for other in existing if other.name > path.name]
        if resume != "auto" and later:
            raise UserError(f"train.resume={resume}, but {folder} holds {later[0]}: {OTHER_FOLDER}")
        return path
    if candidates:
        raise UserError(f"train.resume={resume}: no usable checkpoint among {[path.name for path in candidates]}")
    return None


@dataclass(frozen=True)
class Resumption:
    """The run that is to go on.

    Attributes:
        model: converted, with its frozen parts marked. Its parameters may lack values; its experts are those of one of
            `ep_size` ranks. None: not known, and then neither is `base`.
        base: what its checkpoints leave out, see `Saving`.
        order: what the order of its data depends on, see `order_of`.
        files_follow: whether another data file may take the place of the one that the checkpoint was in.
    """

    config: RunConfig
    model: torch.nn.Module | None
    ep_size: int
    base: dict[str, object] | None
    order: DataPosition
    files_follow: bool


def misfits(path: Path, run: Resumption) -> list[str]:
    """Every reason for which a run cannot go on from a checkpoint that is whole.

    Raises `UserError` for a file whose header cannot be read.
    """
    state, (found, other_rank) = json.loads((path / STATE).read_text()), _other_run(path, run.config)
    if run.model is not None and not other_rank:
        of_model = model_misfits(path, run.model, run.ep_size, run.base)
        found += of_model or (_unlearned(path, run) if state["adam_step"] else [])
    if run.files_follow and not same_file(state["data"], run.order):
        return found
    return found + position_problems(state["data"], run.order)


def model_misfits(path: Path, model: torch.nn.Module, ep_size: int, base: dict[str, object] | None) -> list[str]:
    """Why the weights of a checkpoint are none of this model upon this base; arguments as in `Resumption`."""
    reader, found = Reader(path), []
    parameters = saved_parameters(model, with_frozen=base is None)
    wanted = {f"weight/{name}" for name in parameters} | {f"buffer/{name}" for name, _ in persistent_buffers(model)}
    saved = {key for key in reader.tensors if key.startswith(MODEL)}
    if wanted != saved:
        missing, unexpected = sorted(wanted - saved)[:NAMED], sorted(saved - wanted)[:NAMED]
        text = f"checkpoint {path} does not fit this model: missing {missing}, unexpected {unexpected}"
        found.append(text + _of_a_convolution(saved - wanted, model))
    for name in parameters if wanted == saved else ():
        here, there = list(full_shape(name, parameters[name], ep_size)), reader.shape(f"weight/{name}")
        if here != there:
            found.append(f"checkpoint {path} does not fit this model: {name} is {there} there and {here} here")
            break
    saved_base = json.loads((path / STATE).read_text()).get("base")
    if saved_base != base:
        found.append(
            f"checkpoint {path} was trained upon another model (model.path, or model.preset and train.seed): "
            f"{saved_base} there, {base} here"
        )
    return found


def _of_a_convolution(unexpected: set[str], model: torch.nn.Module) -> str:
    """A clause about a checkpoint of an earlier build, whose lora.targets meant convolutions too; empty for any
    other."""
    modules, updates = dict(model.named_modules()), (update_of(key.removeprefix("weight/")) for key in unexpected)
    names = sorted({update.weight.removesuffix(".weight") for update in updates if update is not None})
    of = [name for name in names if name in modules and not isinstance(modules[name], torch.nn.Linear)]
    if not of:
        return ""
    return (
        f"; lora.targets no longer means the convolution {of[0]} ({OTHER_FOLDER}; ds-moe export --adapter still has it)"
    )


def _unlearned(path: Path, run: Resumption) -> list[str]:
    """A complaint about parameters that are trained now and were frozen, or were trained by Muon and now by AdamW."""
    saved, short = Reader(path).tensors, by_muon(run.model, run.config)
    trained = [name for name, one in run.model.named_parameters() if one.requires_grad]
    new = [name for name in trained if f"{ADAM_MOMENTS[0]}/{name}" not in saved]
    if not new:
        if all(name in short or f"{ADAM_MOMENTS[1]}/{name}" in saved for name in trained):
            return []
        return [f"checkpoint {path} was trained by Muon, and holds no second moments for AdamW: {KEEP_MUON}"]
    more = f" and {len(new) - NAMED} more" if len(new) > NAMED else ""
    return [
        f"checkpoint {path} holds no Adam moments of {', '.join(new[:NAMED])}{more}, frozen there and trained here: "
        f"freeze them, or {START_ANEW}"
    ]


def _other_run(path: Path, config: RunConfig) -> tuple[list[str], bool]:
    """(why a run file does not go on from that of a checkpoint, whatever the tensors are; whether that explains tensors
    of other shapes)."""
    try:
        then, task = load_run(path / "run.yaml"), changed_keys(path, config).get("task")
    except UserError:  # of a version whose run files this one cannot read: its tensors tell what they can
        return [], False
    found = [] if task is None else [f"checkpoint {path} is of another task ({task}): {START_ANEW}"]
    if (updates := other_updates(path, then, config)) is None:
        return found, False
    return [*found, f"{updates.text} ({updates.fix}; or {START_ANEW})"], updates.key == "lora.rank"


def saved_parameters(model: torch.nn.Module, with_frozen: bool) -> dict[str, torch.nn.Parameter]:
    """The parameters that a checkpoint holds, by name."""
    return {name: one for name, one in model.named_parameters() if with_frozen or one.requires_grad}


def persistent_buffers(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that belong to a model's state. Under ZeRO-3, module.state_dict() would return empty parameters."""
    return [
        (f"{prefix}.{name}" if prefix else name, buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
