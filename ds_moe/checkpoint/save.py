"""Writes checkpoints, in one format for resuming, resharding and export (see `files.py`).

A folder is written under a temporary name and renamed when it is complete; then the file `latest` is replaced. Values
are stored by parameter rather than by ZeRO partition, so that any world size, EP size or ZeRO stage can resume.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from ds_moe.checkpoint.files import FORMAT, MANIFEST, file_table, incomplete, step_folders, step_name, write_json
from ds_moe.checkpoint.fit import persistent_buffers, saved_parameters
from ds_moe.checkpoint.host_copy import HostCopy
from ds_moe.checkpoint.room import checkpoint_bytes, no_room
from ds_moe.distributed import Topology, over_ranks, raise_together, together
from ds_moe.engine import masters as zero_state
from ds_moe.errors import UserError
from ds_moe.models.families import expert_state
from ds_moe.models.stored_names import CARRIED
from ds_moe.weights.files import shards, write_tensors

POLL_S = 1.0  # seconds between looks at the size of the files that are being written
FILE_BYTES = 2**32  # a rank's tensors are in files of about this size
PARTIAL = ".partial_"  # a folder that is being written has a name that begins with this


class Saving:
    """A checkpoint that is being written.

    Making this object collects all values (collective). Then a thread writes this rank's files while training goes on;
    the thread takes part in no collective. `finish` waits for it, and makes a checkpoint of the files of all ranks.

    Args:
        folder: `<output_dir>/checkpoints`.
        state: JSON-able, and must hold `step`. Adam's step and the topology are added.
        write_extras: called on rank 0 with the folder, to write everything that is no tensor (run.yaml, model/).
        keep: how many complete checkpoints to leave in the folder, including this one.
        best: name of one that is left too, however old it is.
        base: identifies the frozen model, whose parameters are then left out; None: they are saved too.
        carried: this rank's share of what the files of the model hold and the model has no use for.
        progress: called for every parameter that is collected.

    Raises:
        UserError: on every rank, if rank 0 cannot write to the folder, or its disk has no room for the checkpoint.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        topology: Topology,
        folder: Path,
        state: dict[str, Any],
        write_extras: Callable[[Path], None],
        keep: int,
        base: dict[str, Any] | None = None,
        carried: Mapping[str, Tensor] | None = None,
        best: str | None = None,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.topology, self.keep, self.write_extras = folder, topology, keep, write_extras
        self.best = best
        self.final = folder / step_name(state["step"])
        self.partial = folder / f"{PARTIAL}{self.final.name}"
        self.state = {
            **state,
            "format": FORMAT,
            "adam_step": zero_state.adam_step(engine),
            "world_size": topology.world_size,
            "ep_size": topology.ep_size,
            "base": base,
        }
        shares = over_ranks(sum(value.nbytes for value in (carried or {}).values()))
        parameters = saved_parameters(engine.module, base is None).items()
        short = {name for name, one in parameters if len(zero_state.moments(one)) == 1}
        size = checkpoint_bytes(engine.module, topology.ep_size, base is None, by_muon=short) + sum(shares)
        prepare = (lambda: self._prepare(size)) if topology.rank == 0 else lambda: None
        raise_together(together(topology, f"prepare {self.partial}", prepare)[topology.rank])
        tensors = _collect(engine, topology, base is None, progress)
        for name, value in (carried or {}).items():
            tensors[f"{CARRIED}{name}"] = (value, [0, value.shape[0] if value.dim() else 1])
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._share = thread.submit(_write_rank, self.partial, topology.rank, tensors, _rng_states(topology))
        thread.shutdown(wait=False)  # it ends when it has written

    @property
    def written(self) -> bool:
        """Whether the thread has written this rank's files, or has failed."""
        return self._share.done()

    def finish(self, progress: Callable[[], None] = lambda: None) -> Path:
        """Wait for the files of all ranks and make them a checkpoint (collective).

        Earlier complete checkpoints are deleted, except for the newest `keep` - 1. `progress` is called whenever this
        rank's files have grown.

        Raises:
            UserError: on every rank, if any rank could not write. Earlier checkpoints are not touched, and the files of
                this one are removed.
        """
        size = 0
        while wait([self._share], POLL_S).not_done:
            if (now := self._size()) > size:
                size = now
                progress()
        try:
            shares = together(self.topology, f"write checkpoint {self.final}", self._share.result)
            complete = (lambda: self._complete(shares)) if self.topology.rank == 0 else lambda: None
            together(self.topology, f"finish checkpoint {self.final}", complete)
        except UserError:
            if self.topology.rank == 0:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise
        return self.final

    def _size(self) -> int:
        return sum(file.stat().st_size for file in self.partial.glob(f"*-{self.topology.rank:05d}*.safetensors"))

    def _prepare(self, size: int) -> str | None:
        """Make the folder to write `size` bytes in; if there is no room for them, return why, and make nothing."""
        for left in self.folder.glob(f"{PARTIAL}*"):  # a run that was killed has left these
            shutil.rmtree(left)
        problem = no_room(self.folder, size)
        if problem is None:
            self.partial.mkdir(parents=True)
        return problem

    def _complete(self, shares: list[_Share]) -> None:
        self.write_extras(self.partial)
        write_json(self.partial / "state.json", self.state)
        written = {name: entry for share in shares for name, entry in share.files.items()}
        extras = [file for file in self.partial.rglob("*") if file.is_file() and file.name not in written]
        pieces: dict[str, list[Any]] = {}
        for share in shares:
            for key, piece in share.pieces.items():
                pieces.setdefault(key, []).append(piece)
        files = {**written, **file_table(self.partial, extras)}
        write_json(self.partial / MANIFEST, {"format": FORMAT, "files": files, "tensors": pieces})
        shutil.rmtree(self.final, ignore_errors=True)
        self.partial.rename(self.final)
        _call_latest(self.final)
        whole = [path for path in step_folders(self.folder) if path.name <= self.final.name and not incomplete(path)]
        for old in whole[self.keep :]:
            if old.name != self.best:
                shutil.rmtree(old)


def forget_later(path: Path) -> bool:
    """Make a checkpoint the newest one of its folder: those behind it are removed. False: it is not there, or not
    whole, and nothing is removed."""
    if incomplete(path) is not None:
        return False
    _call_latest(path)
    for other in step_folders(path.parent):
        if other.name > path.name:
            shutil.rmtree(other)
    return True


def _call_latest(path: Path) -> None:
    write_json(path.parent / ".latest", path.name)
    (path.parent / ".latest").replace(path.parent / "latest")


def _collect(
    engine: deepspeed.DeepSpeedEngine, topology: Topology, with_frozen: bool, progress: Callable[[], None]
) -> dict[str, tuple[Tensor, list[int]]]:
    """Collect this rank's share of all tensors (collective): {kind/name: (value, rows [start, stop))}.

    The values are the checkpoint's own: training does not change them.
    """
    mine: dict[str, tuple[Tensor, list[int]]] = {}
    to_host = HostCopy(topology.device)
    zero_state.link_moments(engine)
    has_moments = zero_state.adam_step(engine) > 0
    expert_copies = topology.world_size // topology.ep_size
    for index, (name, parameter) in enumerate(saved_parameters(engine.module, with_frozen).items()):
        progress()
        sharded = expert_state(name)
        writer = topology.rank // topology.ep_size if sharded else topology.rank
        writes = writer == index % (expert_copies if sharded else topology.world_size)
        moments = zero_state.moments(parameter) if has_moments and parameter.requires_grad else ()
        for kind in (zero_state.WEIGHT, *moments):
            value = zero_state.read(parameter, kind)
            if writes:
                rows = value.shape[0] if value.dim() else 1
                start = topology.ep_rank * rows if sharded else 0
                mine[f"{kind}/{name}"] = (to_host(value), [start, start + rows])
    if topology.rank == 0:
        for name, buffer in persistent_buffers(engine.module):
            rows = buffer.shape[0] if buffer.dim() else 1
            mine[f"buffer/{name}"] = (to_host(buffer), [0, rows])
    return mine


@dataclass
class _Share:
    """What one rank has written: its files with size and checksum, and which rows of each tensor they hold."""

    files: dict[str, dict[str, Any]]
    pieces: dict[str, list[Any]]  # kind/name -> [file, first row, end of rows]


def _write_rank(
    folder: Path, rank: int, tensors: dict[str, tuple[Tensor, list[int]]], rng: dict[str, Tensor]
) -> _Share:
    """Write this rank's files, and hash each while the next is written. `tensors` is emptied on the way."""
    plan = shards({key: value.nbytes for key, (value, _) in tensors.items()}, FILE_BYTES)
    pieces: dict[str, list[Any]] = {}
    with ThreadPoolExecutor(1, "checksums") as hashing:
        rng_file = folder / f"rng-{rank:05d}.safetensors"
        write_tensors(rng_file, rng)
        tables = [hashing.submit(file_table, folder, [rng_file])]
        for number, keys in enumerate(plan):
            file = folder / f"rank-{rank:05d}{f'-{number:03d}' if len(plan) > 1 else ''}.safetensors"
            values = {key: tensors.pop(key) for key in keys}
            pieces |= {key: [file.name, *rows] for key, (_, rows) in values.items()}
            write_tensors(file, {key: value for key, (value, _) in values.items()})
            tables.append(hashing.submit(file_table, folder, [file]))
        return _Share({name: entry for table in tables for name, entry in table.result().items()}, pieces)


def _rng_states(topology: Topology) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if topology.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(topology.device)
    return states
