"""Checkpoints: one topology-free form for save, resume, reshard and export.

    <output_dir>/checkpoints/step_00000120/
        rank-00000.safetensors ...  fp32 weights and Adam moments by parameter name; experts as blocks of rows
        rng-00000.safetensors ...   this rank's random states
        state.json                  step, data position, topology, Adam's step, versions
        run.yaml, model/            the resolved run; config, generation config and processor of the model
        manifest.json               every file with size and SHA-256, every tensor with its place; written last

A folder is written under a temporary name and renamed when it is whole; `latest` is moved after that. Nothing in it is
a pickle. Values are stored by parameter, not by ZeRO partition, so any world size, EP size or ZeRO stage can resume.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ds_moe import zero_state
from ds_moe.engine import Topology
from ds_moe.errors import UserError
from ds_moe.models.convert import expert_state

FORMAT = 1
STEP_FOLDER = re.compile(r"step_(\d{8})")


@dataclass
class Loaded:
    """What a resume needs beside the weights: `state` as it was saved, and where it came from."""

    path: Path
    state: dict[str, Any]


def save(
    engine: deepspeed.DeepSpeedEngine,
    topology: Topology,
    folder: Path,
    state: dict[str, Any],
    write_extras: Callable[[Path], None],
    keep: int,
) -> Path:
    """Write a checkpoint of the current step (collective) and delete all but the newest `keep`.

    Args:
        folder: `<output_dir>/checkpoints`.
        state: JSON-able; must hold `step`. Adam's step and the topology are added.
        write_extras: called on rank 0 with the folder to fill in what is no tensor (run.yaml, model/).

    Raises:
        UserError: on every rank, when any rank could not write; no earlier checkpoint is touched.
    """
    final = folder / f"step_{state['step']:08d}"
    partial = folder / f".partial_{final.name}"
    if topology.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = {
        **state,
        "format": FORMAT,
        "adam_step": zero_state.adam_step(engine),
        "world_size": topology.world_size,
        "ep_size": topology.ep_size,
    }
    tensors = _collect(engine, topology)
    places = _together(topology, f"write checkpoint {final}", lambda: _write_rank(partial, topology, tensors))

    def finish() -> None:
        write_extras(partial)
        _write_json(partial / "state.json", state)
        files = {
            str(path.relative_to(partial)): {"size": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        merged: dict[str, list[Any]] = {}
        for rank_places in places:
            for key, pieces in rank_places.items():
                merged.setdefault(key, []).extend(pieces)
        _write_json(partial / "manifest.json", {"format": FORMAT, "files": files, "tensors": merged})
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _write_json(folder / ".latest", final.name)
        (folder / ".latest").replace(folder / "latest")
        for old in _step_folders(folder)[keep:]:
            shutil.rmtree(old)

    _together(topology, f"finish checkpoint {final}", finish if topology.rank == 0 else lambda: None)
    return final


def _collect(engine: deepspeed.DeepSpeedEngine, topology: Topology) -> dict[str, tuple[Tensor, list[int]]]:
    """This rank's share of all tensors, {kind/name: (value, rows [start, stop))}; every rank takes part in each read."""
    mine: dict[str, tuple[Tensor, list[int]]] = {}
    kinds = (zero_state.WEIGHT, *(zero_state.MOMENTS if zero_state.adam_step(engine) else ()))
    expert_copies = topology.world_size // topology.ep_size
    for index, (name, parameter) in enumerate(engine.module.named_parameters()):
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


def _persistent_buffers(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that belong to a model's state (module.state_dict() would gather nothing useful under ZeRO-3)."""
    return [
        (f"{prefix}.{name}" if prefix else name, buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


def _write_rank(folder: Path, topology: Topology, tensors: dict[str, tuple[Tensor, list[int]]]) -> dict[str, list[Any]]:
    name = f"rank-{topology.rank:05d}.safetensors"
    save_file({key: value for key, (value, _) in tensors.items()}, folder / name)
    save_file(_rng_states(topology), folder / f"rng-{topology.rank:05d}.safetensors")
    return {key: [[name, *rows]] for key, (_, rows) in tensors.items()}


def _rng_states(topology: Topology) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if topology.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(topology.device)
    return states


def newest_complete(folder: Path, note: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint below `folder` that is whole; those passed over are noted with the reason."""
    for path in _step_folders(folder):
        problem = incomplete(path)
        if problem is None:
            return path
        note(f"checkpoint {path} is not usable: {problem}; trying the one before it")
    return None


def incomplete(path: Path) -> str | None:
    """Why a checkpoint folder cannot be used, naming the file, or None if every file has its size."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"manifest.json has format {manifest['format']}, this version reads {FORMAT}"
        for name, entry in manifest["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != entry["size"]:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {entry['size']}"
    except (OSError, KeyError, ValueError) as error:
        return f"manifest.json cannot be read ({error})"
    return None


def resume_path(resume: str, folder: Path, topology: Topology, note: Callable[[str], None] = print) -> Path | None:
    """Rank 0's choice for `train.resume` (auto, never, or a folder), the same on every rank.

    Raises:
        UserError: a named folder that is no complete checkpoint.
    """

    def choose() -> Path | None:
        if resume == "never":
            return None
        if resume == "auto":
            return newest_complete(folder, note)
        problem = incomplete(Path(resume))
        if problem is not None:
            raise UserError(f"train.resume={resume} is no complete checkpoint: {problem}")
        return Path(resume)

    choices = _together(topology, "choose a checkpoint", choose if topology.rank == 0 else lambda: None)
    return choices[0]


def load(engine: deepspeed.DeepSpeedEngine, topology: Topology, path: Path) -> Loaded:
    """Fill weights, Adam, schedule and random states from a checkpoint of any topology (collective).

    Raises:
        UserError: a file that does not match its checksum, or tensors that do not fit this model.
    """
    manifest = json.loads((path / "manifest.json").read_text())
    _together(topology, f"verify checkpoint {path}", lambda: _verify(path, manifest, topology))
    state = json.loads((path / "state.json").read_text())
    reader = Reader(path, manifest)
    parameters = dict(engine.module.named_parameters())
    buffers = dict(_persistent_buffers(engine.module))
    wanted = {f"weight/{name}" for name in parameters} | {f"buffer/{name}" for name in buffers}
    saved = {key for key in manifest["tensors"] if key.split("/", 1)[0] not in zero_state.MOMENTS}
    if wanted != saved:
        raise UserError(
            f"checkpoint {path} does not fit this model: missing {sorted(wanted - saved)[:5]}, "
            f"unexpected {sorted(saved - wanted)[:5]}"
        )
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
    return Loaded(path, state)


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


class Reader:
    """Reads whole tensors, or some of their first rows, from a checkpoint's pieces; nothing else is loaded."""

    def __init__(self, path: Path, manifest: dict[str, Any] | None = None) -> None:
        self.path = path
        self.tensors = (manifest or json.loads((path / "manifest.json").read_text()))["tensors"]
        self._files: dict[str, Any] = {}

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self.path / name, framework="pt")
        return self._files[name]

    def shape(self, key: str) -> list[int]:
        """The whole tensor's shape."""
        pieces = self.tensors[key]
        shape = self._file(pieces[0][0]).get_slice(key).get_shape()
        return [max(piece[2] for piece in pieces), *shape[1:]] if shape else shape

    def read(self, key: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor `kind/name`, or its rows [start, stop) of the first dimension.

        Raises:
            UserError: the checkpoint holds no such tensor or not all of these rows.
        """
        pieces = sorted(self.tensors.get(key, []), key=lambda piece: piece[1])
        if not pieces:
            raise UserError(f"checkpoint {self.path} holds no {key}")
        start, stop = rows or (0, pieces[-1][2])
        parts, position = [], start
        for name, first, last in pieces:
            if first <= position < min(last, stop):
                if last - first == 1 and not self._file(name).get_slice(key).get_shape():
                    return self._file(name).get_tensor(key)
                parts.append(self._file(name).get_slice(key)[position - first : min(last, stop) - first])
                position = min(last, stop)
        if position != stop:
            raise UserError(f"checkpoint {self.path} holds {key} only up to row {position} of {stop}")
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _verify(path: Path, manifest: dict[str, Any], topology: Topology) -> None:
    """Check the checksums, each rank its share of the files."""
    for index, (name, entry) in enumerate(sorted(manifest["files"].items())):
        if index % topology.world_size == topology.rank and _sha256(path / name) != entry["sha256"]:
            raise UserError(f"{path / name} is damaged: its SHA-256 is not the manifest's; delete the checkpoint folder")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step_folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [path for path in folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, reverse=True)


def _write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _together(topology: Topology, what: str, action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank and share results; if it failed anywhere, every rank raises and none waits in vain."""
    try:
        outcome = (True, action())
    except (OSError, UserError) as error:
        outcome = (False, f"rank {topology.rank} could not {what}: {error}")
    outcomes: list[Any] = [None] * topology.world_size
    dist.all_gather_object(outcomes, outcome)
    failures = [message for ok, message in outcomes if not ok]
    if failures:
        raise UserError("; ".join(failures))
    return [result for _, result in outcomes]
