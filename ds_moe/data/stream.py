"""The training data of one rank: endless optimizer steps of micro-batches, with an exact position."""

import atexit
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from ds_moe.config.run import RunConfig
from ds_moe.data.bad_records import BadRecordLog
from ds_moe.data.batch import Batch
from ds_moe.data.chat import BadRecord
from ds_moe.data.encode import Encoded
from ds_moe.data.encoder import Encoder
from ds_moe.data.order import FILLER, PaddedRows, Rows
from ds_moe.data.packing import Fill, PackedRows
from ds_moe.data.position import DataPosition, epoch_order_of, order_of, position_problems
from ds_moe.data.prepared import Asides, find_prepared
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import CHAT, RecordKind
from ds_moe.data.records import DATA_CACHE, open_records
from ds_moe.data.row_part import part_of_row
from ds_moe.data.token_counts import TokenCounts, token_counts
from ds_moe.data.windows import PoolPlace
from ds_moe.data.workers import start_method
from ds_moe.errors import UserError, all_in_one
from ds_moe.faults.signals import leave_to_parent

PREFETCH = 2  # steps that a loading process prepares ahead, unless the run file says otherwise


class StepStream(Protocol):
    """What a run asks of its training data; `TrainStream` says what each of it means."""

    kinds: tuple[str, ...]
    notes: list[str]

    @property
    def steps_per_epoch(self) -> int | None:
        """None: not known before a pass over the data."""
        ...

    @property
    def rows(self) -> PaddedRows | PackedRows | None:
        """None: not known yet."""
        ...

    @property
    def fill(self) -> Fill | None: ...

    @property
    def remembered(self) -> list[object]: ...

    @property
    def error(self) -> str | None: ...

    @property
    def order(self) -> DataPosition: ...

    def __iter__(self) -> Iterator[list[Batch]]: ...

    def close(self) -> None: ...

    def samples_of(self, position: int) -> list[list[str]]: ...

    def state_dict(self) -> DataPosition: ...

    def load_state_dict(self, state: DataPosition) -> None: ...


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


class StepDataset(Dataset):
    """Makes the `Step` at a position; the loading processes run it. A subclass says of what.

    Args:
        kinds: labels of records, in the order of their numbers.
        packed: whether a micro-batch is one packed row.
        part: which part of each row this rank takes, and of how many.
    """

    def __init__(
        self,
        encoder: Encoder,
        processor: Processor,
        record_kind: RecordKind,
        kinds: tuple[str, ...],
        rank: int,
        packed: bool,
        part: tuple[int, int],
    ):
        self.part, self.parts = part
        self.encoder, self.processor, self.record_kind, self.packed = encoder, processor, record_kind, packed
        self.rank, self.kind_ids = rank, {kind: number for number, kind in enumerate(kinds)}

    def __getitem__(self, position: int) -> Step:
        step = Step([])
        try:
            rows = self._rows(step, position)
            self._load(step, [micro_step[self.rank] for micro_step in rows])
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
            encoded, used, bad = self.encoder.encode(indices)
            step.aside = self.encoder.aside
            self._check(used, encoded)
            batch = self.record_kind.collate(encoded, self.processor, packed=self.packed)
            batch.kind_B = torch.tensor([self.kind_ids.get(sample.kind, -1) for sample in encoded])
            if self.parts > 1:
                batch = part_of_row(batch, self.part, self.parts, self.processor)
            step.micro_batches.append(batch)
            step.bad += bad


class LoadedSteps:
    """Endless steps that loading processes, or this one, make in turn. A subclass says of what, and counts them.

    Args:
        log: takes up the bad records that are found while loading.

    Attributes: as of `TrainStream`.
    """

    def __init__(self, config: RunConfig, log: BadRecordLog):
        self._config, self._log, self._asides = config, log, Asides("data.train")
        self._position = 0  # steps yielded since the very first
        self._loading: Iterator[Step] | None = None
        self.fill: Fill | None = None
        self.skipped = log.records

    def _dataset(self) -> StepDataset:
        """Makes the steps from the present place on."""
        raise NotImplementedError

    def _passed(self, step: Step) -> None:
        """The step is about to be yielded."""
        self._position += 1

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
            batch_size=None,
            sampler=count(self._position),
            num_workers=data.num_workers,
            prefetch_factor=(data.prefetch_factor or PREFETCH) if data.num_workers else None,
            multiprocessing_context=start_method(data.num_workers),
            worker_init_fn=leave_to_parent,
            generator=torch.Generator(),  # the default one would make the model's random state depend on loading
        )


def check_batches(config: RunConfig, world_size: int) -> None:
    """Raise `UserError` where padded micro-batches do not make up a global batch on so many ranks."""
    train = config.train
    per_micro_step = train.micro_batch_size * world_size
    if train.global_batch_size % per_micro_step:
        raise UserError(
            f"train.global_batch_size: {train.global_batch_size} is no multiple of train.micro_batch_size "
            f"{train.micro_batch_size} x {world_size} ranks (make it a multiple of {per_micro_step})"
        )


class _IndexedSteps(StepDataset):
    """The steps of records that are all known."""

    def __init__(self, rows: PaddedRows | PackedRows, counts: TokenCounts | None, *made_of: Any):
        super().__init__(*made_of)
        self.rows, self.counts = rows, counts

    def _rows(self, step: Step, position: int) -> Rows:
        rows = self.rows.of_step(position)
        if isinstance(self.rows, PackedRows):
            step.fill = self.rows.fill(rows)
        return rows

    def _check(self, used: list[int], encoded: list[Encoded]) -> None:
        if self.counts is not None:
            self.counts.check(used, encoded, self.encoder)


class TrainStream(LoadedSteps):
    """Endless optimizer steps of one rank, each a list of micro-batches, equally many on every rank.

    Padded micro-batches have `train.micro_batch_size` samples, so that all steps have as many of them. Packed ones are
    rows of `train.tokens_per_micro_batch` tokens, of which each step has as many as its samples need.

    With `raise_errors` False a bad record that is found while loading, under `data.on_bad_record: stop`, is not raised
    but kept as `error`. The step is yielded with a filler in the record's place, so that ranks can tell each other and
    stop together.

    Args:
        rank, world_size: which rows are this rank's; ranks that share rows count as one.
        part: which part of each packed row this rank takes, and of how many.
        patch_cost: the time of a patch in that of a token, by which packed rows are balanced over the ranks.

    Attributes:
        kinds: labels of the records; `kind_B` of a micro-batch are indices into them.
        notes: lines for the summary of a run.
        rows: which records each rank takes in each step.
        fill: how full the packed rows of the steps were that this process has yielded; None: none yet, or padded ones.
        skipped: the bad records so far: those of structure, the same on every rank, and those that loading has found
            on this rank. The output folder's `bad_records.jsonl` lists those of all ranks.

    Raises:
        UserError: for data that cannot be read, or bad records under `stop`; also while iterating.
    """

    def __init__(
        self,
        config: RunConfig,
        processor: Processor,
        *,
        rank: int,
        world_size: int,
        raise_errors: bool = True,
        part: tuple[int, int] = (0, 1),
        record_kind: RecordKind = CHAT,
        patch_cost: float = 0.0,
    ):
        train, data = config.train, config.data
        if not data.packing:
            check_batches(config, world_size)
        records = open_records(data.train, "train", data, Path(train.output_dir) / DATA_CACHE, record_kind)
        self._records, self.kinds = records, records.kinds
        order = epoch_order_of(config, records)
        prepared, note = find_prepared(config, "train", records, processor)
        self.notes = [note] if note else []
        self._processor, self._encoder = processor, Encoder(config, records, processor, prepared=prepared)
        self._rank, self._part, self._counts, bad = rank, part, None, list(records.bad)
        self.rows: PaddedRows | PackedRows = PaddedRows(order, train.micro_batch_size, world_size)
        if data.packing:
            self._counts = token_counts(config, "train", records, self._encoder, processor, prepared)
            bad += self._counts.bad.values()
            sizes = self._counts.tokens, self._counts.patches
            self.rows = PackedRows(order, *sizes, patch_cost, config.tokens_per_row, world_size)
        self.steps_per_epoch = order.steps_per_epoch
        super().__init__(config, BadRecordLog(config, bad, rank, raise_errors, lists=part[0] == 0))

    def _dataset(self) -> StepDataset:
        about = self._encoder, self._processor, self._records.record_kind, self.kinds
        return _IndexedSteps(self.rows, self._counts, *about, self._rank, self._counts is not None, self._part)

    @property
    def remembered(self) -> list[object]:
        """What `RecordKind.remember` has returned for every record of the file."""
        return self._records.remembered

    def samples_of(self, position: int) -> list[list[str]]:
        """file:line of the samples of one step, by rank of the job; `position` counts steps since the very first."""
        by_rank = zip(*self.rows.of_step(position), strict=True)
        found = [[self._records.where(index) for row in rows for index in row if index != FILLER] for rows in by_rank]
        return [samples for samples in found for _ in range(self._part[1])]

    @property
    def order(self) -> DataPosition:
        """Everything that the order of the data depends on."""
        return order_of(self._config, self._records)

    def state_dict(self) -> DataPosition:
        """The place after the last yielded step, and everything that the order of the data depends on."""
        epoch, step = divmod(self._position, self.steps_per_epoch)
        return {"epoch": epoch, "step": step, **self.order}

    def load_state_dict(self, state: DataPosition) -> None:
        """Go on after the saved step. Raises `UserError` if the order of the data would not be the saved one."""
        if problems := position_problems(state, self.order):
            raise all_in_one(problems)
        self._position = int(state["epoch"]) * self.steps_per_epoch + int(state["step"])
