"""One optimizer step of a rank as it is made, by a loading process or by this one, wherever its records come from."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from multiprocessing.util import Finalize

import torch
from torch.utils.data import Dataset, get_worker_info

from ds_moe.data.ahead import Ahead
from ds_moe.data.batch import Batch
from ds_moe.data.chat import BadRecord
from ds_moe.data.encode import Encoded
from ds_moe.data.encoder import Begun, Encoder
from ds_moe.data.order import Rows
from ds_moe.data.packing import Fill
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import RecordKind
from ds_moe.data.row_part import part_of_row
from ds_moe.data.windows import PoolPlace
from ds_moe.data.workers import image_threads
from ds_moe.errors import UserError


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
    planned: list[int] | None = None  # in streamed data, the tokens with which packed rows were planned, by record


@dataclass
class BegunStep:
    """One whose records have been read; `micro_steps` are this rank's that have not been made yet."""

    position: int
    step: Step
    micro_steps: deque[list[Begun]]


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
    """Makes the `Step` at a position; the loading processes run it. A subclass says of what.

    Where this process has threads for images, they decode those of the next step while this one is made and used.
    """

    def __init__(self, maker: BatchMaker):
        self.maker = maker
        self._ahead: Ahead | None = None
        self._next: BegunStep | None = None

    def __getitem__(self, position: int) -> Step:
        loaders = worker.num_workers if (worker := get_worker_info()) else 0
        if self._ahead is None and (threads := image_threads(loaders)):
            self._ahead = Ahead(threads)  # in the process that uses it
            if loaders:  # whose end waits for its threads, and nobody else closes them
                Finalize(None, self._ahead.close, exitpriority=0)
        begun = self._next if self._next and self._next.position == position else self._begin(position)
        self._next = self._begin(position + max(loaders, 1)) if self._ahead else None
        try:
            self._load(begun)
        except UserError as error:
            begun.step.error = str(error)
        return begun.step

    def close(self) -> None:
        """The threads end."""
        if self._ahead is not None:
            self._ahead.close()

    def _begin(self, position: int) -> BegunStep:
        begun = BegunStep(position, Step([]), deque())
        begin, rank = self.maker.encoder.begin, self.maker.rank
        try:
            for micro_step in self._rows(begun.step, position):
                begun.micro_steps.append([begin(index, self._ahead) for index in micro_step[rank]])
        except UserError as error:
            begun.step.error = str(error)
        return begun

    def _rows(self, step: Step, position: int) -> Rows:
        """What each rank takes in each micro-step, as indices of the encoder's records; `step` is told its fill."""
        raise NotImplementedError

    def _check(self, step: Step, begun: list[Begun], used: list[int], encoded: list[Encoded]) -> None:
        """Raise `UserError` where records are not what their row was planned with."""

    def _load(self, begun: BegunStep) -> None:
        step = begun.step
        while begun.micro_steps:
            of_batch = begun.micro_steps.popleft()
            encoded, used, bad = self.maker.encoder.finish(of_batch)
            step.aside = self.maker.encoder.aside
            self._check(step, of_batch, used, encoded)
            step.micro_batches.append(self.maker.batch(encoded))
            step.bad += bad
