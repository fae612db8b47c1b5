"""Blocks of data files: what is read at once where records are streamed, without an index of rows.

A block of a JSONL file is a range of bytes; a line belongs to the block in which it begins. A block of a Parquet file
is a row group, one of an Arrow file a record batch. Which blocks there are follows from sizes and headers alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from ds_moe.data.images import ImageRoot
from ds_moe.data.sources.as_opened import FileAsOpened
from ds_moe.data.sources.files import DataFile
from ds_moe.data.sources.jsonl import MAX_LINE, check_no_array, json_value
from ds_moe.data.tables import ArrowShard, ParquetShard
from ds_moe.errors import UserError, one_line

BLOCK = 2**17  # bytes of a block of JSONL, unless there would be more than MOST_BLOCKS
MOST_BLOCKS = 2**21  # what a permutation of them takes stays at some tens of megabytes
SAMPLE = 2**12  # bytes at each of some places of a file, its start and end among them, that tell whether it has changed
PLACES = 64  # of a source, and at least three of a file
SAMPLED_FILES = 256  # of a source with more of them the sizes of all are compared, but the bytes of so many
HEADERS_AT_ONCE = 16  # of Parquet and Arrow files
BLANK = np.frombuffer(b"\t\n\v\f\r ", dtype=np.uint8)


@dataclass(frozen=True)
class Source:
    """Files that are dealt out together.

    Attributes:
        name: what figures per kind call its records; None: they have none.
        weight: its share of the samples, with those of the other sources; None: every record once an epoch.
        columns: see `ds_moe.data.sources.columns.renamed`.
        root: what image paths start from, where the files do not say it; None: the folder of each.
    """

    files: tuple[DataFile, ...]
    name: str | None = None
    weight: float | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    root: Path | None = None

    def root_of(self, file: DataFile) -> Path | ImageRoot:
        """Where the images of a file's records are."""
        return file.root or self.root or file.path.absolute().parent.resolve()


class RowBlock(Protocol):
    """Rows of one file, in their order."""

    file: DataFile

    def __len__(self) -> int: ...

    def length(self, row: int) -> int:
        """Bytes of a row: they rank samples by length."""
        ...

    def record(self, row: int) -> object:
        """What the file holds there. Raises `RecordError` where it holds none."""
        ...

    def where(self, row: int) -> str:
        """FILE@BYTE of a line, FILE:ROW (from 1) of a table."""
        ...


class JsonlBlock:
    """The lines that begin in bytes `start` to `end` of a file, blank ones left out.

    Raises:
        UserError: the file has changed since the start, a line is far too long, or it is a JSON array.
    """

    def __init__(self, file: DataFile, opened: FileAsOpened, start: int, end: int) -> None:
        self.file = file
        self._raw, self._base = _read_lines(opened, start, end)
        raw_B = np.frombuffer(self._raw, dtype=np.uint8)
        begin_N = np.flatnonzero(raw_B[: max(end - 1 - self._base, 0)] == ord("\n")) + 1
        if start == 0 and opened.size:
            begin_N = np.concatenate([[0], begin_N])
        end_N = np.concatenate([begin_N[1:], [len(self._raw)]])[: len(begin_N)]
        for row in np.flatnonzero(end_N - begin_N > MAX_LINE)[:1]:
            where = f"{file.name}@{self._base + begin_N[row]}"
            raise UserError(f"{where}: a line of more than {MAX_LINE} bytes (write one record a line)")
        blank_N = np.isin(raw_B[begin_N], BLANK)
        for row in np.flatnonzero(blank_N):
            blank_N[row] = not self._raw[begin_N[row] : end_N[row]].strip()
        self._begin_N, self._end_N = begin_N[~blank_N].astype(np.int32), end_N[~blank_N].astype(np.int32)
        if start == 0 and len(self):
            check_no_array(file.name, self._line(0))

    def __len__(self) -> int:
        return len(self._begin_N)

    def length(self, row: int) -> int:
        return int(self._end_N[row] - self._begin_N[row])

    def record(self, row: int) -> object:
        return json_value(self._line(row), "write one complete object a line")

    def where(self, row: int) -> str:
        return f"{self.file.name}@{self._base + int(self._begin_N[row])}"

    def _line(self, row: int) -> bytes:
        return self._raw[self._begin_N[row] : self._end_N[row]]


def _read_lines(opened: FileAsOpened, start: int, end: int) -> tuple[bytes, int]:
    """(the bytes from just before `start` to the end of the last line that begins before `end`, where they begin)."""
    base = max(start - 1, 0)  # a line begins at `start` if the byte before is the end of another
    with opened.open() as lines:
        lines.seek(base)
        raw = lines.read(end - base)
        begun = start == 0 or b"\n" in raw[:-1]
        if begun and end < opened.size and not raw.endswith(b"\n"):
            raw += lines.readline(MAX_LINE + 1)
    return raw, base


class Shard(Protocol):
    """A file in blocks.

    Attributes:
        opened: the file as it was then.
        sizes: (blocks,) int64, about how many bytes each takes in memory.
        rows: (blocks,) int64, of each; (0,): they are not known before it is read.
    """

    file: DataFile
    opened: FileAsOpened
    sizes: np.ndarray
    rows: np.ndarray

    def read(self, block: int) -> RowBlock: ...


class JsonlShard:
    """Blocks of `step` bytes."""

    def __init__(self, file: DataFile, opened: FileAsOpened, step: int) -> None:
        self.file, self.opened, self._step, size = file, opened, step, opened.size
        self.rows = np.zeros(0, np.int64)
        self.sizes = np.minimum(size - np.arange(-(-size // step), dtype=np.int64) * step, step)

    def read(self, block: int) -> RowBlock:
        return JsonlBlock(self.file, self.opened, block * self._step, min((block + 1) * self._step, self.opened.size))


@dataclass(frozen=True)
class Blocks:
    """All blocks of some sources, by number.

    Attributes:
        sizes: (blocks,) int64, bytes.
        sha256: of each source, of the names, sizes and samples of its files: a run does not resume with other ones.
        first_of_shard: (files + 1,) int64, the number of each file's first block.
        source_of_shard: (files,) int64, the index of its source.
    """

    sources: tuple[Source, ...]
    sizes: np.ndarray
    sha256: tuple[str, ...]
    shards: list[Shard] = field(repr=False)
    first_of_shard: np.ndarray = field(repr=False)
    source_of_shard: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, sources: Sequence[Source]) -> Blocks:
        """Raises `UserError` for files that cannot be read block by block, and for a source without any byte."""
        files = [(number, file) for number, source in enumerate(sources) for file in source.files]
        opened = [FileAsOpened.of(file.path, file.name) for _, file in files]
        text = sum(one.size for (_, file), one in zip(files, opened, strict=True) if file.form == "jsonl")
        step = BLOCK
        while text // step > MOST_BLOCKS:
            step *= 2
        with ThreadPoolExecutor(HEADERS_AT_ONCE) as threads:
            shards = list(threads.map(lambda one, as_opened: _shard(one[1], as_opened, step), files, opened))
        counts = np.array([len(shard.sizes) for shard in shards])
        source_S = np.array([number for number, _ in files])
        blocks_of = np.bincount(source_S, weights=counts, minlength=len(sources))
        for number in np.flatnonzero(blocks_of == 0)[:1]:
            first, *others = sources[number].files
            text = f"{first.name} and {len(others)} more files have" if others else f"{first.name} has"
            raise UserError(f"data.train: {text} no record to use (empty)")
        sha256 = []
        for number, source in enumerate(sources):
            own = [shard for shard, other in zip(shards, source_S, strict=True) if other == number]
            sha256.append(_sha256(own, source))
        of_all = np.concatenate([shard.sizes for shard in shards])
        return cls(tuple(sources), of_all, tuple(sha256), shards, np.cumsum([0, *counts]), source_S)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def files(self) -> int:
        return len(self.shards)

    def source(self, block: int) -> int:
        """The index of the source that a block belongs to."""
        return int(self.source_of_shard[self._shard(block)])

    def read(self, block: int) -> RowBlock:
        shard = self._shard(block)
        return self.shards[shard].read(block - int(self.first_of_shard[shard]))

    def _shard(self, block: int) -> int:
        return int(np.searchsorted(self.first_of_shard, block, side="right")) - 1


def _shard(file: DataFile, opened: FileAsOpened, step: int) -> Shard:
    if file.compressed or file.form == "tar":
        what = "is compressed" if file.compressed else "is an archive"
        raise UserError(f"data.streaming reads files from any place on, and {file.name} {what} (unpack it)")
    if file.form == "jsonl":
        return JsonlShard(file, opened, step)
    from pyarrow import ArrowException

    try:
        return (ParquetShard if file.form == "parquet" else ArrowShard)(file, opened)
    except (OSError, ValueError, EOFError, NotImplementedError, ArrowException) as error:
        what = "a Parquet file" if file.form == "parquet" else "an Arrow file of `save_to_disk`"
        raise UserError(f"data: {file.name} is not {what} that can be read ({one_line(error)})") from error


def _sha256(shards: list[Shard], source: Source) -> str:
    digest = hashlib.sha256(str(sorted(source.columns.items())).encode())  # other columns are other records
    for shard in shards:
        digest.update(f"{shard.file.path.name} {shard.opened.size} {len(shard.sizes)}\n".encode())
        digest.update(shard.rows.tobytes())
    chosen = np.unique(np.linspace(0, len(shards) - 1, min(len(shards), SAMPLED_FILES)).astype(int))
    for shard in (shards[number] for number in chosen):
        with shard.opened.open() as file:
            last = max(shard.opened.size - SAMPLE, 0)
            for start in np.linspace(0, last, max(3, PLACES // len(chosen))):
                file.seek(int(start))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()
