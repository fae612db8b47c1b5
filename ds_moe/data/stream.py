"""The training data of one rank: endless optimizer steps of micro-batches, with an exact position."""

from collections.abc import Iterator
from typing import Protocol

from ds_moe.config.run import RunConfig
from ds_moe.data.batch import Batch
from ds_moe.data.encode import Encoded
from ds_moe.data.encoder import Begun
from ds_moe.data.fingerprint import Fingerprint, fingerprint
from ds_moe.data.order import PaddedRows, Rows
from ds_moe.data.packing import Fill, PackedRows
from ds_moe.data.position import DataPosition, epoch_order_of, order_of
from ds_moe.data.processor import Processor
from ds_moe.data.ready import ReadyRecords
from ds_moe.data.record_kind import CHAT, RecordKind
from ds_moe.data.records import records_of
from ds_moe.data.step_dataset import BatchMaker, Step, StepDataset
from ds_moe.data.steps import LoadedSteps, check_batches
from ds_moe.data.token_counts import TokenCounts


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


class _IndexedSteps(StepDataset):
    """The steps of records that are all known."""

    def __init__(self, maker: BatchMaker, rows: PaddedRows | PackedRows, counts: TokenCounts | None):
        super().__init__(maker)
        self.rows, self.counts = rows, counts

    def _rows(self, step: Step, position: int) -> Rows:
        rows = self.rows.of_step(position)
        if isinstance(self.rows, PackedRows):
            step.fill = self.rows.fill(rows)
        return rows

    def _check(self, step: Step, begun: list[Begun], used: list[int], encoded: list[Encoded]) -> None:
        if self.counts is not None:
            self.counts.check(used, encoded, self.maker.encoder)


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
        check_batches(config, world_size)
        records = records_of(config, "train", record_kind)
        order = epoch_order_of(config, records)
        ready = ReadyRecords.of(config, "train", records, processor)
        self._records, self._counts, self.notes = records, ready.counts, ready.notes
        self.rows: PaddedRows | PackedRows = PaddedRows(order, config.train.micro_batch_size, world_size)
        if ready.counts is not None:
            sizes = ready.counts.tokens, ready.counts.patches
            self.rows = PackedRows(order, *sizes, patch_cost, config.tokens_per_row, world_size)
        self.steps_per_epoch = order.steps_per_epoch
        packed = ready.counts is not None
        maker = BatchMaker(ready.encoder, processor, records.record_kind, records.kinds, rank, part, packed)
        super().__init__(config, maker, ready.bad, raise_errors)

    def _dataset(self) -> StepDataset:
        return _IndexedSteps(self._maker, self.rows, self._counts)

    @property
    def remembered(self) -> list[object]:
        """What `RecordKind.remember` has returned for every record of the file."""
        return self._records.remembered

    @property
    def made_of(self) -> Fingerprint:
        """Everything that the tensors of the records follow from, and which record each index is."""
        return fingerprint(self._config, self._records, self._maker.processor)

    def samples_of(self, position: int) -> list[list[str]]:
        """file:line of the samples of one step, by rank of the job; `position` counts steps since the very first."""
        return self._samples(self.rows.of_step(position), self._records)

    @property
    def order(self) -> DataPosition:
        return order_of(self._config, self._records)

    def state_dict(self) -> DataPosition:
        """The place after the last yielded step, and everything that the order of the data depends on."""
        epoch, step = divmod(self._position, self.steps_per_epoch)
        return {"epoch": epoch, "step": step, **self.order}

    def _go_to(self, state: DataPosition) -> None:
        self._position = int(state["epoch"]) * self.steps_per_epoch + int(state["step"])
