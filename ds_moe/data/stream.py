"""Micro-batches for one rank: endless optimizer steps to train on, and held-out samples to evaluate."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from ds_moe.config.run import RunConfig
from ds_moe.data.bad_records import BadRecordLog
from ds_moe.data.batch import Batch
from ds_moe.data.chat import BadRecord, Sample
from ds_moe.data.encode import collate_prompts
from ds_moe.data.encoder import Encoder
from ds_moe.data.order import FILLER, EpochOrder
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import CHAT, RecordKind, Records
from ds_moe.data.records import open_records
from ds_moe.errors import UserError
from ds_moe.faults.signals import leave_to_parent

DataPosition = dict[str, int | str]  # as a checkpoint's state.json holds it
PREFETCH = 2  # steps a worker prepares ahead, unless the run file says otherwise


@dataclass
class Step:
    """One optimizer step on this rank. What is wrong travels as a value: a worker's traceback is no message."""

    micro_batches: list[Batch]
    bad: list[BadRecord] = field(default_factory=list)
    error: str | None = None  # a `UserError`, which ends the run


class _StepDataset(Dataset):
    """Position of a step -> `Step`: runs in the workers."""

    def __init__(
        self, order: EpochOrder, encoder: Encoder, processor: Processor, slices: list[slice], records: Records
    ):
        self.order, self.encoder, self.processor, self.slices = order, encoder, processor, slices
        self.record_kind = records.record_kind
        self.kind_ids = {kind: number for number, kind in enumerate(records.kinds)}

    def __getitem__(self, position: int) -> Step:
        indices = self.order.global_batch(position)
        step = Step([])
        try:
            self._fill(step, indices)
        except UserError as error:
            step.error = str(error)
        return step

    def _fill(self, step: Step, indices: list[int]) -> None:
        for one in self.slices:
            encoded, _, bad = self.encoder.encode(indices[one])
            batch = self.record_kind.collate(encoded, self.processor)
            batch.kind_B = torch.tensor([self.kind_ids.get(sample.kind, -1) for sample in encoded])
            step.micro_batches.append(batch)
            step.bad += bad


class TrainStream:
    """Endless optimizer steps for one rank: each a list of `accumulation` micro-batches.

    The `kind_B` of a micro-batch are indices into `kinds`.
    `skipped` are the bad records so far: of structure (the same on every rank) and, found while loading, of this rank;
    `<output_dir>/bad_records.jsonl` lists those of all ranks. Raises `UserError` for bad data, as config.data says.

    With `raise_errors` False a bad record found while loading under `stop` is not raised but kept as `error`, and the
    step, a filler in the record's place, is yielded all the same: so that ranks can tell each other and stop together.
    """

    def __init__(
        self,
        config: RunConfig,
        processor: Processor,
        *,
        rank: int,
        world_size: int,
        raise_errors: bool = True,
        record_kind: RecordKind = CHAT,
    ):
        train, data = config.train, config.data
        per_micro_step = train.micro_batch_size * world_size
        if train.global_batch_size % per_micro_step:
            raise UserError(
                f"train.global_batch_size: {train.global_batch_size} is no multiple of train.micro_batch_size "
                f"{train.micro_batch_size} x {world_size} ranks (make it a multiple of {per_micro_step})"
            )
        self.accumulation = train.global_batch_size // per_micro_step
        records = open_records(data.train, "train", data, _cache_dir(config), record_kind)
        self._records, self.kinds = records, records.kinds
        self._order = EpochOrder(
            records.lengths, train.global_batch_size, train.seed, data.shuffle, data.length_grouping
        )
        self._config, self._processor, self._encoder = config, processor, Encoder(config, records, processor)
        size = train.micro_batch_size
        starts = [
            [(micro * world_size + one) * size for micro in range(self.accumulation)] for one in range(world_size)
        ]
        self._slices_by_rank = [[slice(start, start + size) for start in of_rank] for of_rank in starts]
        self._slices = self._slices_by_rank[rank]
        self._position = 0  # steps yielded since the very first
        self._loading: Iterator[Step] | None = None
        self.steps_per_epoch = self._order.steps_per_epoch
        self._log = BadRecordLog(config, records.bad, rank, raise_errors)
        self.skipped = self._log.records

    @property
    def remembered(self) -> list[object]:
        """What the kind of record remembers of every record of the file (`RecordKind.remember`)."""
        return self._records.remembered

    @property
    def error(self) -> str | None:
        """Without `raise_errors`: the bad record, with the fix, that must end the run. None: all is well."""
        return self._log.error

    def __iter__(self) -> Iterator[list[Batch]]:
        for step in self._steps():
            if step.error is not None:
                raise UserError(step.error)
            self._log.note(step.bad)
            self._position += 1  # before the yield: a checkpoint taken while the step is in use counts it
            yield step.micro_batches

    def close(self) -> None:
        """End the loading processes; nothing to do where this process loads by itself.

        They ignore the signals of launchers, and Python's exit would wait for them for ever while a traceback, say,
        still refers to the loader.
        """
        shut_down = getattr(self._loading, "_shutdown_workers", None)  # torch has no public way
        if shut_down is not None:
            shut_down()

    def _steps(self) -> Iterator[Step]:
        self._loading = iter(self._loader())
        try:
            yield from self._loading
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise UserError(
                f"data.num_workers: a loading process died: {str(error).splitlines()[0].strip()} (it had too little "
                "memory, or a file crashed its decoder: data.num_workers=0 shows where)"
            ) from error

    def _loader(self) -> DataLoader:
        dataset = _StepDataset(self._order, self._encoder, self._processor, self._slices, self._records)
        data = self._config.data
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=count(self._position),
            num_workers=data.num_workers,
            prefetch_factor=(data.prefetch_factor or PREFETCH) if data.num_workers else None,
            worker_init_fn=leave_to_parent,
            generator=torch.Generator(),  # its own: the model's random state must not depend on when loading starts
        )

    def samples_of(self, position: int) -> list[list[str]]:
        """file:line of the samples of the step at `position` (steps since the very first), by rank."""
        indices = self._order.global_batch(position)
        return [
            [self._records.where(index) for one in slices for index in indices[one] if index != FILLER]
            for slices in self._slices_by_rank
        ]

    def state_dict(self) -> DataPosition:
        """JSON-able: the place after the last yielded step, and what decided the order up to it."""
        epoch, step = divmod(self._position, self.steps_per_epoch)
        return {"epoch": epoch, "step": step, **self._identity()}

    def is_file_of(self, state: DataPosition) -> bool:
        """Whether a saved position is one in this stream's file."""
        return state.get("data.train sha256") == self._records.sha256

    def load_state_dict(self, state: DataPosition) -> None:
        """Go on after the saved step. Raises `UserError` if the order would not be the one that was saved."""
        missing = [key for key in ("epoch", "step", *self._identity()) if key not in state]
        if missing:
            raise UserError(
                f"train.resume: the checkpoint's data position lacks {missing[0]!r} (use another checkpoint)"
            )
        for key in ("epoch", "step"):
            if type(state[key]) is not int or state[key] < 0:
                raise UserError(f"train.resume: the checkpoint's data position has {key} {state[key]!r} (use another)")
        for key, now in self._identity().items():
            if state[key] != now:
                raise UserError(
                    f"train.resume: {key} was {state[key]!r} in the checkpoint and is {now!r} now, so the data would "
                    "not go on where they stopped (restore it, or start anew in another train.output_dir)"
                )
        self._position = state["epoch"] * self.steps_per_epoch + state["step"]

    def _identity(self) -> DataPosition:
        """All that the order of the data depends on, under the names that the run file gives it."""
        order = self._order
        return {
            "data.train sha256": self._records.sha256,
            "data.train records": len(order.lengths),
            "train.seed": order.seed,
            "train.global_batch_size": order.global_batch_size,
            "data.shuffle": order.shuffle,
            "data.length_grouping": order.length_grouping,
        }


def _cache_dir(config: RunConfig) -> Path:
    """Where Parquet files are mapped into memory."""
    return Path(config.train.output_dir) / "data_cache"


@dataclass(frozen=True)
class EvalBatch:
    """B samples of one rank. `weights` are 0 for fillers, whose labels are all without loss and answers empty."""

    batch: Batch
    prompt: Batch  # left-padded
    answers: list[str]
    weights: list[int]
    samples: list[Sample]


class EvalSet:
    """data.eval, dealt out to the ranks in file order. `skipped`, `raise_errors` and `error` as in `TrainStream`."""

    def __init__(
        self,
        config: RunConfig,
        processor: Processor,
        *,
        rank: int,
        world_size: int,
        raise_errors: bool = True,
        record_kind: RecordKind = CHAT,
    ):
        if config.data.eval is None:
            raise UserError('data.eval: is not set (give a JSONL or Parquet file, or "digits")')
        records = open_records(config.data.eval, "held-out", config.data, _cache_dir(config), record_kind)
        self._record_kind = record_kind
        self._size = config.train.eval_batch_size or config.train.micro_batch_size
        self._rank, self._world_size, self._count = rank, world_size, len(records)
        self._processor, self._encoder = processor, Encoder(config, records, processor)
        self._log = BadRecordLog(config, records.bad, rank, raise_errors)
        self.skipped = self._log.records

    @property
    def error(self) -> str | None:
        return self._log.error

    def __len__(self) -> int:
        """Samples over all ranks."""
        return self._count

    def batches(self, limit: int | None = None) -> Iterator[EvalBatch]:
        """This rank's batches, equally many on every rank; with a `limit`, of a fixed random choice of samples."""
        indices = list(range(self._count))
        if limit is not None and limit < self._count:
            indices = sorted(random.Random(0).sample(indices, limit))
        stride = self._size * self._world_size
        indices += [FILLER] * (-len(indices) % stride)
        for start in range(self._rank * self._size, len(indices), stride):
            yield self._batch(indices[start : start + self._size])

    def _batch(self, indices: list[int]) -> EvalBatch:
        encoded, used, bad = self._encoder.encode(indices)
        self._log.note(bad)
        samples = [self._encoder.sample(index) for index in used]
        return EvalBatch(
            batch=self._record_kind.collate(encoded, self._processor),
            prompt=collate_prompts(encoded, self._processor),
            answers=[sample.answer.strip() for sample in samples],
            weights=[int(index != FILLER) for index in used],
            samples=samples,
        )
