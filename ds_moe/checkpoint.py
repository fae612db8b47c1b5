"""Checkpoints: one topology-free form for save, resume, reshard and export (the files: `checkpoint_files.py`).

A folder is written under a temporary name and renamed when it is whole; `latest` is moved after that. Values are stored
by parameter, not by ZeRO partition, so any world size, EP size or ZeRO stage can resume.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from ds_moe import zero_state
from ds_moe.checkpoint_files import (
    FORMAT,
    MANIFEST,
    Reader,
    damaged,
    file_table,
    incomplete,
    read_manifest,
    step_folders,
    write_json,
    write_tensors,
)
from ds_moe.engine import Topology
from ds_moe.errors import UserError
from ds_moe.models.convert import expert_state, full_shape


def save(
    engine: deepspeed.DeepSpeedEngine,
    topology: Topology,
    folder: Path,
    state: dict[str, Any],
    write_extras: Callable[[Path], None],
    keep: int,
    base: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of the current step (collective) and delete all whole ones before it but `keep` - 1.

    Args:
        folder: `<output_dir>/checkpoints`.
        state: JSON-able; must hold `step`. Adam's step and the topology are added.
        write_extras: called on rank 0 with the folder to fill in what is no tensor (run.yaml, model/).
        base: tells which model the frozen parameters are of, which are then left out; None: they are saved too.

    Raises:
        UserError: on every rank, when any rank could not write; no earlier checkpoint is touched.
    """
    final = folder / f"step_{state['step']:08d}"
    partial = folder / f".partial_{final.name}"

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    _together(topology, f"prepare {partial}", prepare if topology.rank == 0 else lambda: None)
    state = {
        **state,
        "format": FORMAT,
        "adam_step": zero_state.adam_step(engine),
        "world_size": topology.world_size,
        "ep_size": topology.ep_size,
        "base": base,
    }
    tensors = _collect(engine, topology, with_frozen=base is None)
    shares = _together(topology, f"write checkpoint {final}", lambda: _write_rank(partial, topology, tensors))

    def finish() -> None:
        write_extras(partial)
        write_json(partial / "state.json", state)
        written = {name: entry for share in shares for name, entry in share.files.items()}
        extras = [file for file in partial.rglob("*") if file.is_file() and file.name not in written]
        pieces: dict[str, list[Any]] = {}
        for share in shares:
            for key, piece in share.pieces.items():
                pieces.setdefault(key, []).append(piece)
        files = {**written, **file_table(partial, extras)}
        write_json(partial / MANIFEST, {"format": FORMAT, "files": files, "tensors": pieces})
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        write_json(folder / ".latest", final.name)
        (folder / ".latest").replace(folder / "latest")
        whole = [path for path in step_folders(folder) if path.name <= final.name and incomplete(path) is None]
        for old in whole[keep:]:
            shutil.rmtree(old)

    _together(topology, f"finish checkpoint {final}", finish if topology.rank == 0 else lambda: None)
    return final


def _collect(
    engine: deepspeed.DeepSpeedEngine, topology: Topology, with_frozen: bool
) -> dict[str, tuple[Tensor, list[int]]]:
    """This rank's share of all tensors: {kind/name: (value, rows [start, stop))}; collective."""
    mine: dict[str, tuple[Tensor, list[int]]] = {}
    zero_state.link_moments(engine)
    kinds = (zero_state.WEIGHT, *(zero_state.MOMENTS if zero_state.adam_step(engine) else ()))
    expert_copies = topology.world_size // topology.ep_size
    for index, (name, parameter) in enumerate(_saved_parameters(engine.module, with_frozen).items()):
        sharded = expert_state(name)
        writer = topology.rank // topology.ep_size if sharded else topology.rank
        writes = writer == index % (expert_copies if sharded else topology.world_size)
        for kind in kinds if parameter.requires_grad else (zero_state.WEIGHT,):
            value = zero_state.read(parameter, kind)
            if writes:
                rows = value.shape[0] if value.dim() else 1
                start = topology.ep_rank * rows if sharded else 0
                mine[f"{kind}/{name}"] = (value.cpu().contiguous(), [start, start + rows])
    if topology.rank == 0:
        for name, buffer in _persistent_buffers(engine.module):
            mine[f"buffer/{name}"] = (buffer.detach().cpu().contiguous(), [0, buffer.shape[0] if buffer.dim() else 1])
    return mine


def _saved_parameters(model: torch.nn.Module, with_frozen: bool) -> dict[str, torch.nn.Parameter]:
    return {name: one for name, one in model.named_parameters() if with_frozen or one.requires_grad}


def _persistent_buffers(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that belong to a model's state (module.state_dict() would gather nothing useful under ZeRO-3)."""
    return [
        (f"{prefix}.{name}" if prefix else name, buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


@dataclass
class _Share:
    """What one rank wrote: its files with size and checksum, and where each of its tensors' rows are."""

    files: dict[str, dict[str, Any]]
    pieces: dict[str, list[Any]]  # kind/name -> [file, first row, end of rows]


def _write_rank(folder: Path, topology: Topology, tensors: dict[str, tuple[Tensor, list[int]]]) -> _Share:
    weights, rng = (folder / f"{kind}-{topology.rank:05d}.safetensors" for kind in ("rank", "rng"))
    write_tensors(weights, {key: value for key, (value, _) in tensors.items()})
    write_tensors(rng, _rng_states(topology))
    pieces = {key: [weights.name, *rows] for key, (_, rows) in tensors.items()}
    return _Share(file_table(folder, [weights, rng]), pieces)


def _rng_states(topology: Topology) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if topology.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(topology.device)
    return states


def choose(resume: str, folder: Path, topology: Topology, note: Callable[[str], None] = print) -> Path | None:
    """The checkpoint that `train.resume` (auto, never, or a folder) means; None to start anew (collective).

    Checksums are verified here, each rank its share. `auto` passes over what is damaged, but never starts anew where
    there are checkpoints, and nothing is ever written among the later ones of another run.

    Raises:
        UserError: no usable checkpoint among those there are, or checkpoints in the way.
    """
    [existing, *_] = _together(topology, "list checkpoints", lambda: step_folders(folder))
    if resume == "never" and existing:
        raise UserError(f"train.resume=never, but {folder} holds {existing[0].name}: choose another train.output_dir")
    candidates = {"never": [], "auto": existing}.get(resume, [Path(resume)])
    for path in candidates:
        problems = _together(topology, f"check {path}", lambda path=path: _problem(path, topology))
        problem = next(filter(None, problems), None)
        if problem is not None:
            note(f"checkpoint {path} cannot be used: {problem}")
            continue
        later = [other.name for other in existing if other.name > path.name]
        if resume != "auto" and later:
            raise UserError(f"train.resume={resume}, but {folder} holds {later[0]}: choose another train.output_dir")
        return path
    if candidates:
        raise UserError(f"train.resume={resume}: no usable checkpoint among {[path.name for path in candidates]}")
    return None


def _problem(path: Path, topology: Topology) -> str | None:
    return incomplete(path) or damaged(path, topology.rank, topology.world_size)


def load(
    engine: deepspeed.DeepSpeedEngine, topology: Topology, path: Path, base: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Fill weights, Adam, schedule and random states from a chosen checkpoint of any topology (collective).

    Args:
        base: as for `save`, of this run.

    Returns:
        The `state` it was saved with.

    Raises:
        UserError: tensors that do not fit this model, or what was trained upon another base.
    """
    manifest = read_manifest(path)
    state = json.loads((path / "state.json").read_text())
    reader = Reader(path, manifest)
    parameters = _saved_parameters(engine.module, with_frozen=base is None)
    buffers = dict(_persistent_buffers(engine.module))
    wanted = {f"weight/{name}" for name in parameters} | {f"buffer/{name}" for name in buffers}
    saved = {key for key in manifest["tensors"] if key.split("/", 1)[0] not in zero_state.MOMENTS}
    if wanted != saved:
        raise UserError(
            f"checkpoint {path} does not fit this model: missing {sorted(wanted - saved)[:5]}, "
            f"unexpected {sorted(saved - wanted)[:5]}"
        )
    if state.get("base") != base:
        raise UserError(
            f"checkpoint {path} was trained upon another model (model.path, or model.preset and train.seed): "
            f"{state.get('base')} there, {base} here"
        )
    for name, parameter in parameters.items():
        here, there = list(full_shape(name, parameter, topology.ep_size)), reader.shape(f"weight/{name}")
        if here != there:
            raise UserError(f"checkpoint {path} does not fit this model: {name} is {there} there and {here} here")
    zero_state.start_adam(engine, state["adam_step"])
    for name, parameter in parameters.items():
        rows = _own_rows(name, parameter, topology)
        zero_state.write(parameter, zero_state.WEIGHT, reader.read(f"weight/{name}", rows))
        if parameter.requires_grad and state["adam_step"]:
            for moment in zero_state.MOMENTS:
                zero_state.write(parameter, moment, reader.read(f"{moment}/{name}", rows))
    for name, buffer in buffers.items():
        buffer.copy_(reader.read(f"buffer/{name}"))
    _restore_progress(engine, state)
    _restore_rng(path, state, topology)
    dist.barrier()
    return state


def _own_rows(name: str, parameter: Tensor, topology: Topology) -> tuple[int, int] | None:
    if not expert_state(name):
        return None
    rows = getattr(parameter, "ds_shape", parameter.shape)[0]
    return topology.ep_rank * rows, (topology.ep_rank + 1) * rows


def _restore_progress(engine: deepspeed.DeepSpeedEngine, state: dict[str, Any]) -> None:
    step = state["step"]
    engine.global_steps = step
    engine.global_samples = step * engine.train_batch_size()
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    engine.lr_scheduler.last_epoch = step - 1
    with warnings.catch_warnings():  # torch takes this for a step of the schedule before one of the optimizer
        warnings.simplefilter("ignore", UserWarning)
        engine.lr_scheduler.step()  # the schedule is a function of the step: no state to convert between topologies


def _restore_rng(path: Path, state: dict[str, Any], topology: Topology) -> None:
    """The saved random states on the same world size; a fresh, reproducible one otherwise."""
    if state["world_size"] != topology.world_size:
        torch.manual_seed(state["step"] * topology.world_size + topology.rank)
        return
    with safe_open(path / f"rng-{topology.rank:05d}.safetensors", framework="pt") as file:
        torch.set_rng_state(file.get_tensor("cpu"))
        if "cuda" in file.keys() and topology.device.type == "cuda":
            torch.cuda.set_rng_state(file.get_tensor("cuda"), topology.device)


def _together(topology: Topology, what: str, action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank and share results; if it failed anywhere, every rank raises and none waits in vain."""
    try:
        outcome = (True, action())
    except Exception as error:  # whatever it is, the others wait for this rank
        outcome = (False, f"rank {topology.rank} could not {what}: {type(error).__name__}: {error}")
    outcomes: list[Any] = [None] * topology.world_size
    dist.all_gather_object(outcomes, outcome)
    failures = [message for ok, message in outcomes if not ok]
    if failures:
        raise UserError("; ".join(failures))
    return [result for _, result in outcomes]
