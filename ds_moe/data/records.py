"""Data files as indexed records, checked once when a file is opened, and parsed again whenever a sample is needed.

JSONL is indexed by line, because Arrow wants one type for `content` and does not say which line is broken. Parquet is
memory-mapped through `datasets`. Offsets, length estimates and bad records stay in memory, but no text and no pixel.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from ds_moe.config.sections import DataConfig
from ds_moe.data.chat import BadRecord
from ds_moe.data.digits import DigitsRecords, Split
from ds_moe.data.images import RecordError
from ds_moe.data.record_kind import CHAT, Parsed, RecordKind, Records
from ds_moe.errors import UserError, shown

if TYPE_CHECKING:
    from datasets import Dataset

DATA_CACHE = "data_cache"  # in a run's output folder: the memory maps of Parquet files
SKIPPING = "data.on_bad_record: skip goes on without"  # what helps against any bad record
MAX_LINE = 2**27  # bytes; twice what a rollout of 64k tokens takes with the routing of 48 layers


Raw = TypeVar("Raw")  # a record as its file holds it


def open_records(
    path: str, split: Split, config: DataConfig, cache_dir: Path | None = None, record_kind: RecordKind = CHAT
) -> Records:
    """The records of data.train ("train") or data.eval ("held-out"): that split of the bundled scans where `path` is
    "digits", else those of a file, as `read_records` gives them."""
    return DigitsRecords(split) if path == "digits" else read_records(path, config, cache_dir, record_kind)


def read_records(
    path: str, config: DataConfig, cache_dir: Path | None = None, record_kind: RecordKind[Parsed] = CHAT
) -> Records[Parsed]:
    """The records of a JSONL or Parquet file, their structure checked.

    Args:
        cache_dir: where the memory map of a Parquet file is written; None: a temporary folder.

    Raises:
        UserError: the file cannot be read or has no record to use, or, under `on_bad_record: stop`, a bad record. Under
            `skip` the bad ones are in `.bad`.
    """
    file = Path(path)
    if not file.is_file():  # reading a pipe or a device might never end
        what = "is no regular file" if file.exists() else "does not exist"
        raise UserError(f'data: {path} {what} (give a JSONL or Parquet file, or "digits")')
    root = Path(config.root or file.parent).resolve()
    if not root.is_dir():
        raise UserError(f"data.root: {config.root} is not a folder (give the folder that the image paths start from)")
    if file.suffix in (".jsonl", ".ndjson", ".json"):
        records = JsonlRecords(file, root, config.max_pixels, record_kind)
    elif file.suffix == ".parquet":
        records = ParquetRecords(file, root, config.max_pixels, record_kind, cache_dir)
    else:
        raise UserError(f"data: {path} is neither .jsonl nor .parquet (convert it, or rename it)")
    if records.bad and config.on_bad_record == "stop":
        raise UserError(stop_message(records.bad))
    if not len(records):
        first = f"; the first: {records.bad[0]}" if records.bad else ""
        raise UserError(f"data: {path} has no record to use ({len(records.bad)} bad{first})")
    return record_kind.complete(records)


def stop_message(bad: list[BadRecord]) -> str:
    """One line for the first bad record and the number of the others."""
    others = f" [and {len(bad) - 1} more bad records]" if len(bad) > 1 else ""
    return f"{bad[0]}{others}; {SKIPPING}"


class _FileRecords(Generic[Raw, Parsed]):
    """What both file types have in common. A subclass walks over its raw records, and reads one by its key."""

    def __init__(self, file: Path, root: Path, max_pixels: int, record_kind: RecordKind[Parsed]):
        self.record_kind = record_kind
        self.sha256 = ""
        self.bad: list[BadRecord] = []
        self.remembered: list[object] = []
        self._file, self._root = file, root
        keys, numbers, lengths, kinds = [], [], [], set()
        for key, number, raw in self._walk():
            try:
                parsed = self._parse(raw, number)
                lengths.append(record_kind.estimate(parsed, max_pixels))
            except RecordError as error:
                self.bad.append(BadRecord(f"{file}:{number}", str(error)))
                continue
            if parsed.kind is not None:
                kinds.add(parsed.kind)
            self.remembered.append(record_kind.remember(parsed))
            keys.append(key)
            numbers.append(number)
        self.kinds: tuple[str, ...] = tuple(sorted(kinds))
        self._keys, self._numbers, self.lengths = (np.array(one, dtype=np.int64) for one in (keys, numbers, lengths))

    def __len__(self) -> int:
        return len(self._keys)

    def sample(self, index: int) -> Parsed:
        return self._parse(self._read(int(self._keys[index])), int(self._numbers[index]))

    def where(self, index: int) -> str:
        return f"{self._file}:{self._numbers[index]}"

    def _parse(self, raw: Raw, number: int) -> Parsed:
        return self.record_kind.parse(self._decode(raw), f"{self._file}:{number}", self._root)

    def _walk(self) -> Iterator[tuple[int, int, Raw]]:
        """(key, number of the line or row from 1, raw record) of every record."""
        raise NotImplementedError

    def _read(self, key: int) -> Raw:
        raise NotImplementedError

    def _decode(self, raw: Raw) -> object:
        """The value that the file holds. Raises `RecordError` where it holds none."""
        return raw


class JsonlRecords(_FileRecords[bytes, Parsed]):
    """One JSON object a line; its key is the byte offset of the line. Blank lines are ignored."""

    def _walk(self) -> Iterator[tuple[int, int, bytes]]:
        digest = hashlib.sha256()
        offset = 0
        with self._file.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), start=1):
                if len(line) > MAX_LINE:
                    fix = "write one record a line"
                    raise UserError(f"{self._file}:{number}: a line of more than {MAX_LINE} bytes ({fix})")
                digest.update(line)
                if number == 1 and line.lstrip()[:1] == b"[":
                    fix = f"jq -c '.[]' {self._file} > {self._file.with_suffix('.converted.jsonl')}"
                    raise UserError(f"{self._file}:1: a JSON array, not one record a line (convert it: {fix})")
                if line.strip():
                    yield offset, number, line
                offset += len(line)
        self.sha256 = digest.hexdigest()

    def _read(self, key: int) -> bytes:
        with self._file.open("rb") as lines:
            lines.seek(key)
            return lines.readline()

    def _decode(self, raw: bytes) -> object:
        try:
            return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique)
        except UnicodeDecodeError as error:
            raise RecordError(f"broken JSON: not UTF-8: {error} (save the file as UTF-8)") from error
        except (ValueError, RecursionError) as error:
            raise RecordError(f"broken JSON: {error} (write one complete object a line)") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object. Raises `RecordError` for equal keys, of which json.loads silently takes the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RecordError(f"the key {shown(twice)} stands twice in one object (keep one of them)")
    return values


class ParquetRecords(_FileRecords[dict[str, object], Parsed]):
    """One record a row; its key is the index of the row."""

    def __init__(
        self, file: Path, root: Path, max_pixels: int, record_kind: RecordKind[Parsed], cache_dir: Path | None
    ):
        import datasets  # an import of a second, which JSONL does not need
        from datasets.exceptions import DatasetGenerationError

        datasets.disable_progress_bars()
        cache = str(cache_dir or tempfile.mkdtemp(prefix="ds_moe_data_"))
        try:
            rows = datasets.Dataset.from_parquet(str(file), cache_dir=cache)
        except (OSError, ValueError, NotImplementedError, DatasetGenerationError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise UserError(f"data: {file} is not a Parquet file that can be read ({reason})") from error
        self._table: Dataset = rows.with_format("arrow")  # raw values, so that no Image column is decoded
        super().__init__(file, root, max_pixels, record_kind)
        with file.open("rb") as stream:
            self.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()

    def _walk(self) -> Iterator[tuple[int, int, dict[str, object]]]:
        return ((row, row + 1, self._read(row)) for row in range(len(self._table)))

    def _read(self, key: int) -> dict[str, object]:
        return self._table[key : key + 1].to_pylist()[0]
