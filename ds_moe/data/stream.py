"""The training data of one rank: endless optimizer steps of micro-batches, with an exact position."""

import atexit
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from ds_moe.config.run import RunConfig
from ds_moe.data.bad_records import BadRecordLog
from ds_moe.data.batch import Batch
from ds_moe.data.chat import BadRecord
from ds_moe.data.encoder import Encoder
from ds_moe.data.order import FILLER, PaddedRows
from ds_moe.data.packing import Fill, PackedRows
from ds_moe.data.position import DataPosition, epoch_order_of, order_of, position_problems
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import CHAT, RecordKind, Records
from ds_moe.data.records import DATA_CACHE, open_records
from ds_moe.data.row_part import part_of_row
from ds_moe.data.token_counts import TokenCounts, token_counts
from ds_moe.data.workers import start_method
from ds_moe.errors import UserError, all_in_one
from ds_moe.faults.signals import leave_to_parent

PREFETCH = 2  # steps that a loading process prepares ahead, unless the run file says otherwise


class StepStream(Protocol):
    """What a run asks of its training data; `TrainStream` says what each of it means."""

    kinds: tuple[str, ...]
    steps_per_epoch: int

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


class _StepDataset(Dataset):
    """Makes the `Step` at a position; the loading processes run it."""

    def __init__(
        self,
        rows: PaddedRows | PackedRows,
        rank: int,
        encoder: Encoder,
        processor: Processor,
        records: Records,
        counts: TokenCounts | None,
        part: tuple[int, int],
    ):
        self.part, self.parts = part
        self.rows, self.rank, self.encoder, self.processor, self.counts = rows, rank, encoder, processor, counts
        self.record_kind = records.record_kind
        self.kind_ids = {kind: number for number, kind in enumerate(records.kinds)}

    def __getitem__(self, position: int) -> Step:
        step = Step([])
        rows = self.rows.of_step(position)
        if isinstance(self.rows, PackedRows):
            step.fill = self.rows.fill(rows)
        try:
            self._load(step, [micro_step[self.rank] for micro_step in rows])
        except UserError as error:
            step.error = str(error)
        return step

    def _load(self, step: Step, micro_steps: list[list[int]]) -> None:
        for indices in micro_steps:
            encoded, used, bad = self.encoder.encode(indices)
            if self.counts is not None:
                self.counts.check(used, encoded, self.encoder)
            batch = self.record_kind.collate(encoded, self.processor, packed=self.counts is not None)
            batch.kind_B = torch.tensor([self.kind_ids.get(sample.kind, -1) for sample in encoded])
            if self.parts > 1:
                batch = part_of_row(batch, self.part, self.parts, self.processor)
            step.micro_batches.append(batch)
            step.bad += bad


class TrainStream:
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
        per_micro_step = train.micro_batch_size * world_size
        if train.global_batch_size % per_micro_step and not data.packing:
            raise UserError(
                f"train.global_batch_size: {train.global_batch_size} is no multiple of train.micro_batch_size "
                f"{train.micro_batch_size} x {world_size} ranks (make it a multiple of {per_micro_step})"
            )
        records = open_records(data.train, "train", data, Path(train.output_dir) / DATA_CACHE, record_kind)
        self._records, self.kinds = records, records.kinds
        order = epoch_order_of(config, records)
        self._config, self._processor, self._encoder = config, processor, Encoder(config, records, processor)
        self._rank, self._part, self._counts, bad = rank, part, None, list(records.bad)
        self.rows: PaddedRows | PackedRows = PaddedRows(order, train.micro_batch_size, world_size)
        if data.packing:
            self._counts = token_counts(config, "train", records, self._encoder, processor)
            bad += self._counts.bad.values()
            sizes = self._counts.tokens, self._counts.patches
            self.rows = PackedRows(order, *sizes, patch_cost, config.tokens_per_row, world_size)
        self._position = 0  # steps yielded since the very first
        self._loading: Iterator[Step] | None = None
        self.steps_per_epoch = order.steps_per_epoch
        self.fill: Fill | None = None
        self._log = BadRecordLog(config, bad, rank, raise_errors, lists=part[0] == 0)
        self.skipped = self._log.records

    @property
    def remembered(self) -> list[object]:
        """What `RecordKind.remember` has returned for every record of the file."""
        return self._records.remembered

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
            except UserError:
                self.close()
                raise
            if step.fill is not None:
                self.fill = step.fill if self.fill is None else self.fill + step.fill
            self._position += 1  # before the yield: a checkpoint that is taken after this step must count it
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
        data, made_of = self._config.data, (self._encoder, self._processor, self._records, self._counts)
        dataset = _StepDataset(self.rows, self._rank, *made_of, self._part)
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=count(self._position),
            num_workers=data.num_workers,
            prefetch_factor=(data.prefetch_factor or PREFETCH) if data.num_workers else None,
            multiprocessing_context=start_method(data.num_workers),
            worker_init_fn=leave_to_parent,
            generator=torch.Generator(),  # the default one would make the model's random state depend on loading
        )

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
