"""`data.streaming`: what a rank trains on where records are neither counted nor indexed before the first step.

The samples of a step are the next ones in the order of `windows.py`, whatever the number of ranks. Each loading process
finds them by itself: it walks through the windows and parses the rows of its own rank alone, but for packed rows, whose
plan needs the tokens of all samples of a step. The place behind a step travels with it; a checkpoint holds it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ds_moe.config.run import RunConfig
from ds_moe.config.sections import sources_of
from ds_moe.config.sources import source_names
from ds_moe.data.bad_records import BadRecordLog
from ds_moe.data.blocks import Blocks, Source
from ds_moe.data.chat import BadRecord
from ds_moe.data.encode import Encoded
from ds_moe.data.encoder import Encoder
from ds_moe.data.images import ImageRoot, RecordError
from ds_moe.data.order import FILLER, PaddedRows, Rows, deal
from ds_moe.data.packing import Fill, PackedRows, pack
from ds_moe.data.position import FILE, DataPosition, position_problems, streamed_order_of
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import CHAT, ParsedRecord, RecordKind, SourceFacts
from ds_moe.data.records import root_of
from ds_moe.data.sources.columns import renamed
from ds_moe.data.sources.files import DataFile
from ds_moe.data.sources.find import data_files
from ds_moe.data.stream import LoadedSteps, Step, StepDataset, StepStream, TrainStream, check_batches
from ds_moe.data.windows import Interleaving, Pool, PoolPlace, Row, draws, whole_numbers
from ds_moe.errors import UserError, all_in_one, shown

MIB = 2**20
PLACES = "places"  # in a checkpoint's position: epoch, window, row and samples of each pool
LOOKED_AT = 100  # records at the start of a source that are asked for its columns
REMEMBERED = 64  # steps whose places are kept, for `samples_of`


def train_stream(config: RunConfig, processor: Processor, **options: Any) -> StepStream:
    """What a run trains on; the options are those of `TrainStream`."""
    return (StreamedTrain if config.data.streaming else TrainStream)(config, processor, **options)


@dataclass(frozen=True)
class Pools:
    """The sources of a run, by what is drawn together.

    Attributes:
        weights: those of the pools; [1] where every record is taken once an epoch, and all sources are one pool.
    """

    blocks: Blocks
    pools: list[Pool]
    weights: list[float]
    lacking: list[str]  # what the first records of sources do not have, see `_lacking`

    @classmethod
    def of(cls, config: RunConfig) -> Pools:
        """Raises `UserError` for files that cannot be read or have no record."""
        sources = sources_of_run(config)
        blocks = Blocks.of(sources)
        weights = [source.weight for source in sources if source.weight is not None]
        chosen = [np.arange(len(blocks))]
        if weights:
            source_B = np.repeat(blocks.source_of_shard, np.diff(blocks.first_of_shard))
            chosen = [np.flatnonzero(source_B == number) for number in range(len(sources))]
        lacking = [clause for number in range(len(sources)) for clause in _lacking(blocks, number)]
        data, seed, weights = config.data, config.train.seed, weights or [1.0]
        windows = [max(MIB, int(data.shuffle_window_mb * MIB * weight / sum(weights))) for weight in weights]
        pools = [
            Pool(blocks, own, window, (seed, number), data.shuffle)
            for number, (own, window) in enumerate(zip(chosen, windows, strict=True))
        ]
        return cls(blocks, pools, weights, lacking)

    def mixture(self, places: Sequence[PoolPlace]) -> Interleaving:
        """The samples from these places on."""
        return Interleaving(self.pools, self.weights, places)

    @property
    def identity(self) -> tuple[Sequence[str], Sequence[float | None]]:
        """What is known of each source before it is read, and its weight."""
        return self.blocks.sha256, [source.weight for source in self.blocks.sources]

    @property
    def start(self) -> list[PoolPlace]:
        return [PoolPlace() for _ in self.pools]

    def outlook(self) -> str:
        """See `StreamedTrain.outlook`."""
        files = f"{self.blocks.files:,} file{'s' if self.blocks.files > 1 else ''}"
        known, records = f"{self.blocks.sizes.sum() / 1e6:,.1f} MB in {files}", 0.0
        for pool in self.pools:
            block = self.blocks.read(pool.first_block(0))
            counted = sum(block.length(row) for row in range(len(block)))
            records += len(block) * pool.bytes / counted if counted else 0.0
        about = (
            f", about {records:,.0f} records, by {len(self.pools)} of {len(self.blocks):,} blocks" if records else ""
        )
        return "; ".join([known + about, *self.lacking])


def sources_of_run(config: RunConfig) -> list[Source]:
    """The sources of data.train with their files. Raises `UserError` as `data_files`."""
    given, names = sources_of(config.data.train), source_names(config.data.train)
    mixed = any(one.weight is not None for one in given)
    found = []
    for one, name in zip(given, names, strict=True):
        files = data_files(one)
        weight = (1.0 if one.weight is None else one.weight) if mixed else None
        brings_none = any(file.root is None for file in files)  # a dataset of the hub says where its images are
        root = root_of(one, config.data) if brings_none else None
        found.append(Source(tuple(files), name if len(given) > 1 else one.name, weight, one.columns, root))
    return found


def _lacking(blocks: Blocks, number: int) -> list[str]:
    """A clause about each column of a source that none of its first records has: JSON may have it further on.

    Raises:
        UserError: no record can have it, or these records have no messages: it is misspelt.
    """
    source, clauses = blocks.sources[number], []
    if not source.columns:
        return clauses
    first = int(blocks.first_of_shard[np.flatnonzero(blocks.source_of_shard == number)[0]])
    block, seen = blocks.read(first), set[str]()
    for row in range(min(LOOKED_AT, len(block))):
        with suppress(RecordError):
            seen.update(record if isinstance(record := block.record(row), dict) else ())
    for ours, theirs in source.columns.items():
        if not seen or theirs in seen:
            continue
        text = f"columns.{ours} names {shown(theirs)}, which the first records of {block.file.name} lack"
        if block.file.form != "jsonl" or (ours == "messages" and ours not in seen):
            raise UserError(f"data: {text} (they have {', '.join(sorted(map(str, seen))[:20])})")
        clauses.append(text)
    return clauses


class Drawn:
    """Rows as records, by their index among those that were drawn last; what an `Encoder` reads."""

    def __init__(self, sources: Sequence[Source], record_kind: RecordKind) -> None:
        self.record_kind, self.rows = record_kind, list[Row]()
        self._sources, self._roots = sources, dict[Path, Path | ImageRoot]()

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int) -> ParsedRecord:
        """Record `index`; a source's name is the kind of its records. Raises `RecordError`."""
        row = self.rows[index]
        source = self._sources[row.source]
        record = renamed(row.block.record(row.number), source.columns)
        if isinstance(record, dict) and source.name is not None:
            record = {**record, "kind": source.name}
        return self.record_kind.parse(record, row.where, self._root_of(source, row.block.file))

    def where(self, index: int) -> str:
        return self.rows[index].where

    def _root_of(self, source: Source, file: DataFile) -> Path | ImageRoot:
        if file.path not in self._roots:
            self._roots[file.path] = source.root_of(file)
        return self._roots[file.path]


class FirstRecords(Drawn):
    """The first `limit` records of each pool, or as many as its first window has, as `record_kind.Records`."""

    def __init__(self, config: RunConfig, record_kind: RecordKind, limit: int) -> None:
        pools = Pools.of(config)
        super().__init__(pools.blocks.sources, record_kind)
        windows = [pool.read(0, 0) for pool in pools.pools]
        sizes = [min(limit, len(window)) for window in windows]
        self.rows = [window[row] for window, size in zip(windows, sizes, strict=True) for row in range(size)]
        self._weights, self._sizes = pools.weights, sizes
        self.lengths = np.array([row.length for row in self.rows], dtype=np.int64)
        self.order, self.outlook = streamed_order_of(config, *pools.identity), pools.outlook()
        self.sha256, self.sources = str(self.order[FILE]), tuple[SourceFacts, ...]()
        self.bad, self.remembered = list[BadRecord](), list[object]()
        self.kinds = tuple(source.name for source in pools.blocks.sources if source.name is not None)

    def in_order(self, count: int) -> list[int]:
        """Indices of the first ones that a run takes, at most `count`: each pool has its share."""
        firsts, taken, found = np.cumsum([0, *self._sizes]), [0] * len(self._sizes), list[int]()
        for pool in draws(whole_numbers(self._weights), taken, count):
            if taken[pool] < self._sizes[pool]:
                found.append(int(firsts[pool]) + taken[pool])
                taken[pool] += 1
        return found


class _StreamedSteps(StepDataset):
    """The steps from a place on."""

    def __init__(self, drawn: Drawn, mixture: Interleaving, position: int, plan: _Plan, *made_of: Any) -> None:
        super().__init__(*made_of)
        self._drawn, self._mixture, self._position, self._plan = drawn, mixture, position, plan
        self._tokens: list[int] | None = None

    def _rows(self, step: Step, position: int) -> Rows:
        size = self._plan.global_batch_size
        self._mixture.skip((position - self._position) * size)  # the steps of other loading processes
        self._drawn.rows = self._mixture.take(size)
        step.next_place, self._position = self._mixture.places, position + 1
        rows, self._tokens = self._plan.rows(self._drawn, self.encoder, self.rank, step)
        return rows

    def _check(self, used: list[int], encoded: list[Encoded]) -> None:
        tokens = self._tokens
        if tokens is None:
            return
        for index, one in zip(used, encoded, strict=True):
            if index != FILLER and len(one.input_ids) != tokens[index]:
                was = f"had {tokens[index]} tokens when its row was planned and has {len(one.input_ids)} now"
                raise UserError(f"{self.encoder.where(index)}: {was}: an image of it has changed")


@dataclass(frozen=True)
class _Plan:
    """Which of the samples of a step each rank takes in each micro-step."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    length_grouping: bool
    capacity: int | None  # tokens of a packed row; None: rows are padded
    patch_cost: float

    def rows(self, drawn: Drawn, encoder: Encoder, rank: int, step: Step) -> tuple[Rows, list[int] | None]:
        """(indices of drawn rows, their tokens where rows are packed). `step` is told the fill and the bad records of
        which this rank is the one to speak."""
        if self.capacity is None:
            indices = list(range(len(drawn)))
            if self.length_grouping:
                indices.sort(key=lambda index: -drawn.rows[index].length)
            return deal(indices, self.micro_batch_size, self.world_size), None
        found = [encoder.measure(index) for index in range(len(drawn))]
        bad = {index: one for index, one in enumerate(found) if isinstance(one, BadRecord)}
        step.bad += [one for index, one in bad.items() if index % self.world_size == rank]
        sizes = np.array([(0, 0) if isinstance(one, BadRecord) else one for one in found], dtype=np.int64)
        usable = np.flatnonzero(sizes[:, 0])
        rows = pack(usable, sizes[:, 0], sizes[:, 1], self.patch_cost, self.capacity, self.world_size)
        step.fill = Fill.of_rows(rows, sizes[:, 0], self.capacity)
        return rows, sizes[:, 0].tolist()


class StreamedTrain(LoadedSteps):
    """Endless optimizer steps of one rank, as `TrainStream` gives them, of records that no pass has counted.

    A sample that cannot be used is replaced by a filler, or left out of packed rows; it is found when it is reached.
    A step never ends with an epoch: the next one begins in the middle of it.

    Args and attributes: as of `TrainStream`. `kinds` are the names of the sources.

    Raises:
        UserError: for files that cannot be read; also while iterating.
    """

    steps_per_epoch: int | None = None
    rows: PaddedRows | PackedRows | None = None

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
    ) -> None:
        train, data = config.train, config.data
        if not data.packing:
            check_batches(config, world_size)
        self._pools = Pools.of(config)
        sources = self._pools.blocks.sources
        self.notes: list[str] = []
        self.kinds = tuple(source.name for source in sources if source.name is not None)
        self.remembered: list[object] = []
        drawn = Drawn(sources, record_kind)
        self._drawn, self._encoder = drawn, Encoder(config, drawn, processor, cache_bytes=0)
        self._processor, self._rank, self._part = processor, rank, part
        self._plan = _Plan(
            train.global_batch_size,
            train.micro_batch_size,
            world_size,
            data.length_grouping,
            config.tokens_per_row if data.packing else None,
            patch_cost,
        )
        self._place = self._pools.start
        self._places: deque[tuple[int, list[PoolPlace]]] = deque([(0, self._place)], maxlen=REMEMBERED)
        super().__init__(config, BadRecordLog(config, [], rank, raise_errors, lists=part[0] == 0))

    def _dataset(self) -> StepDataset:
        about = self._encoder, self._processor, self._drawn.record_kind, self.kinds
        packed = self._plan.capacity is not None
        mixture = self._pools.mixture(self._place)
        return _StreamedSteps(self._drawn, mixture, self._position, self._plan, *about, self._rank, packed, self._part)

    def _passed(self, step: Step) -> None:
        super()._passed(step)
        assert step.next_place is not None  # a step without one has an error, and is not yielded
        self._place = step.next_place
        self._places.append((self._position, self._place))

    def samples_of(self, position: int) -> list[list[str]]:
        """FILE@BYTE or FILE:ROW of the samples of one of the last REMEMBERED steps, or of a later one, by rank."""
        known, places = max((one for one in self._places if one[0] <= position), key=lambda one: one[0])
        mixture, size = self._pools.mixture(places), self._plan.global_batch_size
        mixture.skip((position - known) * size)
        drawn = Drawn(self._pools.blocks.sources, self._drawn.record_kind)
        drawn.rows = mixture.take(size)
        rows, _ = self._plan.rows(drawn, Encoder(self._config, drawn, self._processor, cache_bytes=0), 0, Step([]))
        by_rank = zip(*rows, strict=True)
        found = [[drawn.where(index) for row in of_rank for index in row if index != FILLER] for of_rank in by_rank]
        return [samples for samples in found for _ in range(self._part[1])]

    def outlook(self) -> str:
        """What is known of the data before a pass over them, in a line for people."""
        return self._pools.outlook()

    @property
    def order(self) -> DataPosition:
        """Everything that the order of the data depends on."""
        return streamed_order_of(self._config, *self._pools.identity)

    def state_dict(self) -> DataPosition:
        """The place after the last yielded step, and everything that the order of the data depends on."""
        places = [list(astuple(place)) for place in self._place]
        epoch = min(place.epoch for place in self._place)
        return {"epoch": epoch, "step": self._position, PLACES: places, **self.order}

    def load_state_dict(self, state: DataPosition) -> None:
        """Go on after the saved step. Raises `UserError` if the order of the data would not be the saved one."""
        if problems := position_problems(state, self.order):
            raise all_in_one(problems)
        self._place = _places(state, len(self._pools.pools))
        self._position = int(state["step"])
        self._places.clear()
        self._places.append((self._position, self._place))


def _places(state: Mapping[str, Any], pools: int) -> list[PoolPlace]:
    places = state.get(PLACES)
    if isinstance(places, list) and len(places) == pools and all(map(_is_place, places)):
        return [PoolPlace(*place) for place in places]
    raise UserError(f"train.resume: the checkpoint's data position has {PLACES} {places!r} (use another)")


def _is_place(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(one) is int and one >= 0 for one in value)
