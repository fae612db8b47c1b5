"""Log-probs of the reference that are computed once, before the first step, and kept in a file.

The file is named by everything that they follow from. It is written as the pass goes on: a pass that was stopped goes
on where it was. All ranks take what rank 0 reads.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from ds_moe.checkpoint.base import base_identity
from ds_moe.checkpoint.room import unwritable
from ds_moe.config.deepspeed import precision
from ds_moe.data.batch import Batch
from ds_moe.data.fingerprint import Fingerprint
from ds_moe.data.kept_arrays import read_arrays, write_arrays
from ds_moe.data.order import FILLER
from ds_moe.data.records import DATA_CACHE
from ds_moe.data.stream import TrainStream
from ds_moe.distributed import Topology, over_ranks, raise_together, together
from ds_moe.engine.start import on_cpu
from ds_moe.engine.whole_weights import whole_weights
from ds_moe.errors import UserError
from ds_moe.models.load import model_config
from ds_moe.tasks.dpo.pairs import PairBatch
from ds_moe.tasks.dpo.reference import scored
from ds_moe.tasks.task import TrainingParts

SAVED_EVERY = 64  # turns of the pass
RULES = 1  # of how log-probs are computed: raised where they change


class StoredReference:
    """Log-probs under the model that a run starts from. Make it before any checkpoint is loaded (collective).

    An evaluation of its own has the policy's weights, so it needs the file that the training has left.
    """

    def __init__(self, parts: TrainingParts) -> None:
        self._parts = parts
        self._files = {}
        if parts.stream is not None:
            assert isinstance(parts.stream, TrainStream)  # pairs are not streamed
            self._files["train"] = self._complete("train", parts.stream.made_of)
        if parts.eval_set is not None:
            self._files["held-out"] = self._complete("held-out", parts.eval_set.made_of)

    def added_to(self, batch: PairBatch, split: str) -> PairBatch:
        file = self._files[split]
        logprob_P2 = file.of(batch.number_P.numpy())
        if np.isnan(logprob_P2).any():
            raise UserError(f"{file.path} lacks a record that could not be used when it was written: remove the file")
        return replace(batch, reference_P2=torch.from_numpy(logprob_P2))

    def _complete(self, split: str, content: Fingerprint) -> LogprobFile:
        """The file of a split, whose tensors follow from `content`, after the pass that fills it, if there is anything
        to fill."""
        parts, folder, topology = self._parts, self._parts.config.dpo.reference_dir, self._parts.topology
        root = Path(folder or Path(parts.config.train.output_dir, DATA_CACHE))
        file = LogprobFile(root / f"reference_{split}_{_fingerprint(parts, content)[:16]}.npz")
        file.read(topology)
        if file.complete:
            return file
        if parts.stream is None:
            raise UserError(_not_there(split, folder))
        steps = self._missing(file) if split == "train" else None
        if steps is not None and not steps:
            return file
        key = "dpo.reference_dir" if folder else "train.output_dir"
        raise_together(unwritable(root, key) if topology.rank == 0 else None)
        whole = steps is None or steps.stop == parts.stream.steps_per_epoch
        parts.note(f"reference: log-probs of data.{'train' if split == 'train' else 'eval'} are computed once")
        began = time.monotonic()
        with whole_weights(parts.engine):
            for turn, (micro_batches, last) in enumerate(self._passes(steps), start=1):
                for batch in micro_batches:
                    logprob_P2 = scored(parts.engine, batch.to(topology.device)).cpu()
                    file.found += zip(batch.number_P.tolist(), *logprob_P2.T.tolist(), strict=True)
                if last or turn % SAVED_EVERY == 0:
                    raise_together(parts.stream.error if split == "train" else parts.eval_set.error)
                    file.save(topology, complete=last and whole)
        parts.note(f"reference: {file.count:,} pairs in {time.monotonic() - began:.0f} s, kept in {file.path}")
        return file

    def _missing(self, file: LogprobFile) -> range:
        """The steps whose records must be scored: those that the run takes of the first epoch, which holds every record
        once, but for the first ones, which an earlier pass has scored. A run with more steps completes the file."""
        stream = self._parts.stream
        end = min(stream.steps_per_epoch, self._parts.config.train.steps or stream.steps_per_epoch)
        return range(
            next((step for step in range(end) if not file.knows(chain(*chain(*stream.rows.of_step(step))))), end), end
        )

    def _passes(self, steps: range | None) -> Iterator[tuple[list[Batch], bool]]:
        """Micro-batches of this rank, of steps of the first epoch or (None) held out, and whether they are the last."""
        stream, eval_set = self._parts.stream, self._parts.eval_set
        if steps is None:
            waiting: list[Batch] = []
            for one in eval_set.batches():
                yield waiting, False
                waiting = [one.batch]
            yield waiting, True
            return
        position = {**stream.order, "epoch": 0}
        stream.load_state_dict({**position, "step": steps.start})
        for step, micro_batches in zip(steps, stream, strict=False):
            yield micro_batches, step == steps[-1]
        stream.close()
        stream.load_state_dict({**position, "step": 0})
        stream.fill = None  # the closing table's is of training


def _not_there(split: str, folder: str | None) -> str:
    """Why an evaluation of its own has no log-probs of its data, and what gives it some."""
    theirs, lora = "the reference's log-probs of data.eval", "or evaluate a LoRA run's checkpoint"
    if folder is None or not any(Path(folder).glob(f"reference_{split}_*.npz")):
        where = f"are not in {folder}" if folder else "are not at hand"
        return f"{theirs} {where}: set dpo.reference_dir to the folder data_cache of the run that stored them, {lora}"
    return (
        f"{theirs} in {folder} are of another model, other data or settings (name their run's), or of an earlier build "
        f"(start their run once more, which stores them anew), {lora}"
    )


class LogprobFile:
    """Log-probs of both answers of each record of a file; NaN where none is known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logprob_R2 = np.empty((0, 2))  # fp64
        self.complete = False  # whether every record that can be used has been scored
        self.found: list[tuple[int, float, float]] = []  # by this rank, since the file was last saved

    @property
    def count(self) -> int:
        return int((~np.isnan(self.logprob_R2[:, 0])).sum())

    def read(self, topology: Topology) -> None:
        """Take what rank 0, which alone reads, finds in the file (collective)."""
        read = (lambda: read_arrays(self.path, "logprobs", "complete")) if topology.rank == 0 else lambda: None
        [first, *_] = together(topology, f"read {self.path}", read)
        if first is not None:
            self.logprob_R2, self.complete = first[0], bool(first[1])

    def knows(self, numbers: Iterable[int]) -> bool:
        wanted = [number for number in numbers if number != FILLER]
        return all(number < len(self.logprob_R2) and not np.isnan(self.logprob_R2[number, 0]) for number in wanted)

    def of(self, number_P: np.ndarray) -> np.ndarray:
        """(P, 2): zeros for fillers, NaN for records that are not known."""
        inside = (number_P >= 0) & (number_P < len(self.logprob_R2))
        result = np.where((number_P == FILLER)[:, None], 0.0, np.full((len(number_P), 2), np.nan))
        result[inside] = self.logprob_R2[number_P[inside]]
        return result

    def save(self, topology: Topology, complete: bool) -> None:
        """Put together what all ranks have found, and write the file whole or not at all (collective)."""
        rows = [row for of_rank in over_ranks(self.found) for row in of_rank if row[0] != FILLER]
        self.found = []
        size = max([len(self.logprob_R2), *(number + 1 for number, *_ in rows)])
        grown = np.full((size, 2), np.nan)
        grown[: len(self.logprob_R2)] = self.logprob_R2
        for number, *logprobs in rows:
            grown[number] = logprobs
        self.logprob_R2, self.complete = grown, complete
        arrays = {"logprobs": grown, "complete": np.array(complete)}
        write = (lambda: write_arrays(self.path, **arrays)) if topology.rank == 0 else lambda: None
        together(topology, f"write {self.path}", write)


def _fingerprint(parts: TrainingParts, content: Fingerprint) -> str:
    """A digest of everything that log-probs follow from: the model, and `content`, which tells of its inputs.

    Records are known by their index. Which record an index is depends on those that are left out as bad, and so on
    files of images and on limits; `content` tells of that too.
    """
    config, moe = parts.config, parts.config.moe
    routing = None if moe is None else [moe.router.model_dump(mode="json"), moe.experts.apply_weight]
    made_of = [
        RULES,
        base_identity(config),
        {**model_config(config.model).to_dict(), "_name_or_path": None},
        [config.model.attention, precision(config, on_cpu()), routing],
        content,
    ]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()
