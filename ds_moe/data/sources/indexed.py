"""A data file as records by position, checked once when it is opened, and parsed again whenever a sample is needed.

Offsets, length estimates and bad records stay in memory, but no text and no pixel.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from ds_moe.data.chat import BadRecord
from ds_moe.data.images import ImageRoot, RecordError
from ds_moe.data.record_kind import Parsed, RecordKind, SourceFacts
from ds_moe.data.sources.columns import renamed
from ds_moe.data.sources.files import DataFile

Raw = TypeVar("Raw")  # a record as its file holds it


@dataclass(frozen=True)
class Reading(Generic[Parsed]):
    """How the records of a source are read.

    Attributes:
        root: what image paths start from; None: the folder of each file.
        columns, label: see `columns.renamed`.
        cache_dir: where unpacked files and memory maps are written.
    """

    record_kind: RecordKind[Parsed]
    max_pixels: int
    cache_dir: Path
    root: Path | ImageRoot | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    label: str | None = None


class IndexedRecords(Generic[Raw, Parsed]):
    """What all forms of files have in common. A subclass walks over its raw records, and reads one by its key.

    Attributes:
        seen: the columns that any record has had.
    """

    sha256 = ""
    sources: tuple[SourceFacts, ...] = ()

    def __init__(self, file: DataFile, reading: Reading[Parsed]):
        self.record_kind = reading.record_kind
        self.bad: list[BadRecord] = []
        self.remembered: list[object] = []
        self.seen: set[str] = set()
        self._file, self._reading = file, reading
        self._root: Path | ImageRoot = reading.root or file.path.absolute().parent.resolve()
        keys, numbers, lengths, kinds = [], [], [], set()
        for key, number, raw in self._walk():
            where = self._where(key, number)
            try:
                parsed = self._parse(raw, where)
                lengths.append(reading.record_kind.estimate(parsed, reading.max_pixels))
            except RecordError as error:
                self.bad.append(BadRecord(where, str(error)))
                continue
            if parsed.kind is not None:
                kinds.add(parsed.kind)
            self.remembered.append(reading.record_kind.remember(parsed))
            keys.append(key)
            numbers.append(number)
        self.kinds: tuple[str, ...] = tuple(sorted(kinds))
        self._keys, self._numbers, self.lengths = (np.array(one, dtype=np.int64) for one in (keys, numbers, lengths))

    def __len__(self) -> int:
        return len(self._keys)

    def sample(self, index: int) -> Parsed:
        return self._parse(self._read(int(self._keys[index])), self.where(index))

    def where(self, index: int) -> str:
        return self._where(int(self._keys[index]), int(self._numbers[index]))

    def _parse(self, raw: Raw, where: str) -> Parsed:
        record = self._decode(raw)
        if isinstance(record, dict):
            self.seen.update(record)
        record = renamed(record, self._reading.columns, self._reading.label)
        return self.record_kind.parse(record, where, self._root_of(raw))

    def _where(self, key: int, number: int) -> str:
        """file:line, or what takes its place."""
        return f"{self._file.name}:{number}"

    def _root_of(self, raw: Raw) -> Path | ImageRoot:
        """Where the images that a record names are."""
        return self._root

    def _walk(self) -> Iterator[tuple[int, int, Raw]]:
        """(key, number of the line or row from 1, raw record) of every record."""
        raise NotImplementedError

    def _read(self, key: int) -> Raw:
        raise NotImplementedError

    def _decode(self, raw: Raw) -> object:
        """The value that the file holds. Raises `RecordError` where it holds none."""
        return raw
