"""What is drawn from where nothing is indexed: the sources of a run as pools, and drawn rows as records."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_moe.config.run import RunConfig
from ds_moe.config.sections import sources_of
from ds_moe.config.sources import source_names
from ds_moe.data.blocks import Blocks, Source
from ds_moe.data.chat import BadRecord
from ds_moe.data.images import ImageRoot, RecordError
from ds_moe.data.position import FILE, streamed_order_of
from ds_moe.data.record_kind import ParsedRecord, RecordKind, SourceFacts
from ds_moe.data.records import root_of
from ds_moe.data.sources.columns import renamed
from ds_moe.data.sources.files import DataFile
from ds_moe.data.sources.find import data_files
from ds_moe.data.windows import Interleaving, Pool, PoolPlace, Row, draws, whole_numbers
from ds_moe.errors import UserError, shown

MIB = 2**20
LOOKED_AT = 100  # records at the start of a source that are asked for its columns


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
    def kinds(self) -> tuple[str, ...]:
        """The names of the sources that have one."""
        return tuple(source.name for source in self.blocks.sources if source.name is not None)

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
        self.kinds = pools.kinds

    def in_order(self, count: int) -> list[int]:
        """Indices of the first ones that a run takes, at most `count`: each pool has its share."""
        firsts, taken, found = np.cumsum([0, *self._sizes]), [0] * len(self._sizes), list[int]()
        for pool in draws(whole_numbers(self._weights), taken, count):
            if taken[pool] < self._sizes[pool]:
                found.append(int(firsts[pool]) + taken[pool])
                taken[pool] += 1
        return found
