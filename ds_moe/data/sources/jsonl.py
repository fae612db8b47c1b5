"""JSONL, indexed by line: Arrow wants one type for `content`, and does not say which line is broken."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from ds_moe.data.images import RecordError
from ds_moe.data.record_kind import Parsed
from ds_moe.data.sources.as_opened import FileAsOpened
from ds_moe.data.sources.files import DataFile
from ds_moe.data.sources.indexed import IndexedRecords, Reading
from ds_moe.data.sources.unpack import unpacked
from ds_moe.errors import UserError, shown

MAX_LINE = 2**27  # bytes; twice what a rollout of 64k tokens takes with the routing of 48 layers


class JsonlRecords(IndexedRecords[bytes, Parsed]):
    """One JSON object a line; its key is the byte offset of the line. Blank lines are ignored.

    `sha256` is that of the unpacked lines.
    """

    def __init__(self, file: DataFile, reading: Reading[Parsed]):
        plain = unpacked(file.path, file.name, reading.cache_dir) if file.compressed else file.path
        self._plain = FileAsOpened.of(plain, file.name)
        super().__init__(file, reading)

    def _walk(self) -> Iterator[tuple[int, int, bytes]]:
        digest = hashlib.sha256()
        offset, name = 0, self._file.name
        with self._plain.open() as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), start=1):
                if len(line) > MAX_LINE:
                    raise UserError(f"{name}:{number}: a line of more than {MAX_LINE} bytes (write one record a line)")
                digest.update(line)
                if number == 1:
                    check_no_array(name, line)
                if line.strip():
                    yield offset, number, line
                offset += len(line)
        self.sha256 = digest.hexdigest()

    def _read(self, key: int) -> bytes:
        with self._plain.open() as lines:
            lines.seek(key)
            return lines.readline()

    def _decode(self, raw: bytes) -> object:
        return json_value(raw, "write one complete object a line")


def check_no_array(name: str, line: bytes) -> None:
    """Raise `UserError` where the first line of a file begins a JSON array."""
    if line.lstrip()[:1] == b"[":
        fix = f"jq -c '.[]' {name} > {Path(name).with_suffix('.converted.jsonl')}"
        raise UserError(f"{name}:1: a JSON array, not one record a line (convert it: {fix})")


def json_value(raw: bytes, fix: str) -> object:
    """A value of JSON. Raises `RecordError`, which ends with the fix, for anything else and for equal keys."""
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise RecordError(f"broken JSON: not UTF-8: {error} (save the file as UTF-8)") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"broken JSON: {error} ({fix})") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object. Raises `RecordError` for equal keys, of which json.loads silently takes the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RecordError(f"the key {shown(twice)} stands twice in one object (keep one of them)")
    return values
