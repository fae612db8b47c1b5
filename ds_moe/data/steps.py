"""Optimizer steps of one rank, made by loading processes or by this one, wherever their records come from."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import torch
from torch.utils.data import DataLoader, Dataset

from ds_moe.config.run import RunConfig
from ds_moe.data.bad_records import BadRecordLog
from ds_moe.data.batch import Batch
from ds_moe.data.chat import BadRecord
from ds_moe.data.encode import Encoded
from ds_moe.data.encoder import Encoder
from ds_moe.data.order import FILLER, Rows
from ds_moe.data.packing import Fill
from ds_moe.data.position import DataPosition, position_problems
from ds_moe.data.prepared.find import Asides
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import RecordKind, RecordsByIndex
from ds_moe.data.row_part import part_of_row
from ds_moe.data.windows import PoolPlace
from ds_moe.data.workers import loader_options
from ds_moe.errors import UserError, all_in_one

PREFETCH = 2  # steps that a loading process prepares ahead, unless the run file says otherwise


@dataclass
class Step:
    """One optimizer step of this rank. Errors are values here, because an exception would leave a loading process as a
    traceback."""

    micro_batches: list[Batch]
    bad: list[BadRecord] = field(default_factory=list)
    error: str | None = None  # a `UserError`, which ends the run
    fill: Fill | None = None  # of the packed rows of all ranks
    aside: str | None = None  # why a prepared record was encoded anew
    next_place: list[PoolPlace] | None = None  # in streamed data, where the next one begins


@dataclass(frozen=True)
class BatchMaker:
    """Makes micro-batches out of the records that one rank takes.

    Attributes:
        kinds: labels of records, in the order of their numbers.
        rank: of those that take rows of their own.
        part: which part of each row this rank takes, and of how many.
        packed: whether a micro-batch is one packed row.
    """

    encoder: Encoder
    processor: Processor
    record_kind: RecordKind
    kinds: tuple[str, ...]
    rank: int
    part: tuple[int, int]
    packed: bool

    def batch(self, encoded: list[Encoded]) -> Batch:
        batch = self.record_kind.collate(encoded, self.processor, packed=self.packed)
        numbers = {kind: number for number, kind in enumerate(self.kinds)}
        batch.kind_B = torch.tensor([numbers.get(sample.kind, -1) for sample in encoded])
        part, parts = self.part
        return part_of_row(batch, part, parts, self.processor) if parts > 1 else batch


class StepDataset(Dataset):
    """Makes the `Step` at a position; the loading processes run it. A subclass says of what."""

    def __init__(self, maker: BatchMaker):
        self.maker = maker

    def __getitem__(self, position: int) -> Step:
        step = Step([])
        try:
            rows = self._rows(step, position)
            self._load(step, [micro_step[self.maker.rank] for micro_step in rows])
        except UserError as error:
            step.error = str(error)
        return step

    def _rows(self, step: Step, position: int) -> Rows:
        """What each rank takes in each micro-step, as indices of the encoder's records; `step` is told its fill."""
        raise NotImplementedError

    def _check(self, used: list[int], encoded: list[Encoded]) -> None:
        """Raise `UserError` where records are not what their row was planned with."""

    def _load(self, step: Step, micro_steps: list[list[int]]) -> None:
        for indices in micro_steps:
            encoded, used, bad = self.maker.encoder.encode(indices)
            step.aside = self.maker.encoder.aside
            self._check(used, encoded)
            step.micro_batches.append(self.maker.batch(encoded))
            step.bad += bad


class LoadedSteps:
    """Endless steps that loading processes, or this one, make in turn. A subclass says of what, and counts them.

    Args:
        bad: the bad records that are known beforehand.
        raise_errors: see `TrainStream`.

    Attributes: as of `TrainStream`.
    """

    def __init__(self, config: RunConfig, maker: BatchMaker, bad: list[BadRecord], raise_errors: bool):
        self._config, self._maker, self.kinds = config, maker, maker.kinds
        lists = maker.part[0] == 0  # ranks that share a row load the same records
        self._log, self._asides = BadRecordLog(config, bad, maker.rank, raise_errors, lists), Asides("data.train")
        self._position = 0  # steps yielded since the very first
        self._loading: Iterator[Step] | None = None
        self.fill: Fill | None = None
        self.skipped = self._log.records

    def _dataset(self) -> StepDataset:
        """Makes the steps from the present place on."""
        raise NotImplementedError

    def _passed(self, step: Step) -> None:
        """The step is about to be yielded."""
        self._position += 1

    def _go_to(self, state: DataPosition) -> None:
        """The next step is the one behind `state`, which is of data in this order."""
        raise NotImplementedError

    @property
    def order(self) -> DataPosition:
        """Everything that the order of the data depends on."""
        raise NotImplementedError

    def load_state_dict(self, state: DataPosition) -> None:
        """Go on after the saved step. Raises `UserError` if the order of the data would not be the saved one."""
        if problems := position_problems(state, self.order):
            raise all_in_one(problems)
        self._go_to(state)

    @property
    def error(self) -> str | None:
        """With `raise_errors` False: the bad record that must end the run, and the fix; None: there is none."""
        return self._log.error

    def __iter__(self) -> Iterator[list[Batch]]:
        for step in self._steps():
            try:
                if step.error is not None:
                    raise UserError(step.error)
                self._log.note(step.bad)
                self._asides.say(step.aside)
            except UserError:
                self.close()
                raise
            if step.fill is not None:
                self.fill = step.fill if self.fill is None else self.fill + step.fill
            self._passed(step)  # before the yield: a checkpoint that is taken after this step must count it
            yield step.micro_batches

    def close(self) -> None:
        """End the loading processes; there are none where this process loads by itself.

        They ignore the signals of launchers, and Python's exit would wait for them for ever as long as anything, such
        as a traceback, still refers to the loader. Therefore they are ended at exit too.
        """
        atexit.unregister(self.close)
        shut_down = getattr(self._loading, "_shutdown_workers", None)  # torch has no public way
        if shut_down is not None:
            shut_down()

    def _steps(self) -> Iterator[Step]:
        self._loading = iter(self._loader())
        atexit.register(self.close)  # runs before multiprocessing's, which was registered when it was imported
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
        data = self._config.data
        return DataLoader(
            self._dataset(),
            sampler=count(self._position),
            prefetch_factor=(data.prefetch_factor or PREFETCH) if data.num_workers else None,
            **loader_options(data.num_workers),
        )

    def _samples(self, rows: Rows, records: RecordsByIndex) -> list[list[str]]:
        """file:line of the samples of one step, by rank of the job."""
        by_rank = zip(*rows, strict=True)
        found = [[records.where(index) for row in rows for index in row if index != FILLER] for rows in by_rank]
        return [samples for samples in found for _ in range(self._maker.part[1])]


def check_batches(config: RunConfig, world_size: int) -> None:
    """Raise `UserError` where padded micro-batches do not make up a global batch on so many ranks."""
    train = config.train
    if config.data.packing:
        return
    per_micro_step = train.micro_batch_size * world_size
    if train.global_batch_size % per_micro_step:
        raise UserError(
            f"train.global_batch_size: {train.global_batch_size} is no multiple of train.micro_batch_size "
            f"{train.micro_batch_size} x {world_size} ranks (make it a multiple of {per_micro_step})"
        )
