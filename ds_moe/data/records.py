"""The records of data.train and data.eval: files, folders, archives, hub datasets and mixtures, opened and checked."""

import atexit
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from ds_moe.config.run import RunConfig
from ds_moe.config.sections import DIGITS, DataConfig, Sources, TrainSource, sources_of
from ds_moe.config.sources import source_names
from ds_moe.data.chat import BadRecord
from ds_moe.data.digits import DigitsRecords, Split
from ds_moe.data.record_kind import CHAT, Parsed, RecordKind, Records, SourceFacts
from ds_moe.data.sources.find import data_files
from ds_moe.data.sources.indexed import IndexedRecords, Reading
from ds_moe.data.sources.joined import JoinedRecords
from ds_moe.errors import UserError, shown

DATA_CACHE = "data_cache"  # in a run's output folder: the memory maps of Parquet files, unpacked files
SKIPPING = "data.on_bad_record: skip goes on without"  # what helps against any bad record


def open_records(
    given: Sources, split: Split, config: DataConfig, cache_dir: Path | None = None, record_kind: RecordKind = CHAT
) -> Records:
    """The records of data.train ("train") or data.eval ("held-out"), the structure of each checked.

    "digits" is that split of the bundled scans. Records of several sources that bring no `kind` have the name of their
    source as one.

    Args:
        cache_dir: where the memory maps of Parquet files and unpacked files are written; None: a temporary folder.

    Raises:
        UserError: a file cannot be read or has no record to use, or, under `on_bad_record: stop`, a bad record. Under
            `skip` the bad ones are in `.bad`.
    """
    sources, names = sources_of(given), source_names(given)
    if len(sources) == 1 and sources[0].path == DIGITS:
        return DigitsRecords(split)
    parts: list[Records] = []
    for source, name in zip(sources, names, strict=True):
        label = name if len(sources) > 1 else source.name
        of_digits = source.path == DIGITS
        parts.append(DigitsRecords(split) if of_digits else _open(source, label, config, cache_dir, record_kind))
    bad = [one for part in parts for one in part.bad]
    if bad and config.on_bad_record == "stop":
        raise UserError(stop_message(bad))
    for source, part in zip(sources, parts, strict=True):
        if not len(part):
            first = f"; the first: {part.bad[0]}" if part.bad else ""
            raise UserError(f"data: {source.path} has no record to use ({len(part.bad)} bad{first})")
    if len(parts) == 1:
        return record_kind.complete(parts[0])
    facts = [SourceFacts(name, len(part), part.sha256) for name, part in zip(names, parts, strict=True)]
    return record_kind.complete(JoinedRecords(parts, tuple(facts)))


def records_of(config: RunConfig, split: Split, record_kind: RecordKind = CHAT) -> Records:
    """The records of a run, see `open_records`; what is unpacked or mapped is kept in its output folder."""
    given = config.data.train if split == "train" else config.data.eval
    if given is None:
        raise UserError('data.eval: is not set (give a JSONL or Parquet file, or "digits")')
    return open_records(given, split, config.data, Path(config.train.output_dir, DATA_CACHE), record_kind)


def read_records(
    path: str, config: DataConfig, cache_dir: Path | None = None, record_kind: RecordKind[Parsed] = CHAT
) -> Records[Parsed]:
    """As `open_records`, of one path, which also names a file that is called like the bundled scans."""
    return open_records(path if path != DIGITS else f"./{path}", "train", config, cache_dir, record_kind)


def stop_message(bad: list[BadRecord]) -> str:
    """One line for the first bad record and the number of the others."""
    others = f" [and {len(bad) - 1} more bad records]" if len(bad) > 1 else ""
    return f"{bad[0]}{others}; {SKIPPING}"


def _open(
    source: TrainSource, label: str | None, config: DataConfig, cache_dir: Path | None, record_kind: RecordKind[Parsed]
) -> Records[Parsed]:
    """The records of one source; no bad record is an error yet."""
    files = data_files(source)
    if record_kind.one_file and len(files) > 1:
        raise UserError(f"data: {source.path} is {len(files)} files, and {record_kind.one_file} (name one file)")
    if source.root is not None and files[0].form == "tar":
        raise UserError(
            f"data: root {shown(source.root)} would not be used: {source.path} holds its images (remove it)"
        )
    reading = Reading(
        record_kind=record_kind,
        max_pixels=config.max_pixels,
        cache_dir=cache_dir or _scratch(),
        columns=source.columns,
        label=label,
    )
    roots = [file.root or root_of(source, config) for file in files]  # a hub dataset brings its own
    opened = [_reader(file.form)(file, replace(reading, root=root)) for file, root in zip(files, roots, strict=True)]
    _check_columns(source, opened)
    records = opened[0] if len(opened) == 1 else JoinedRecords(opened)
    if source.columns:  # other columns are other records
        made_of = [records.sha256, sorted(source.columns.items())]
        records.sha256 = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    return records


def _reader(form: str) -> type[IndexedRecords]:
    if form == "tar":
        from ds_moe.data.sources.tar import TarRecords

        return TarRecords
    if form == "jsonl":
        from ds_moe.data.sources.jsonl import JsonlRecords

        return JsonlRecords
    from ds_moe.data.sources.arrow import ArrowRecords

    return ArrowRecords


def _check_columns(source: TrainSource, opened: Sequence[IndexedRecords]) -> None:
    """Raise `UserError` for a column that no record of a source has: it is most likely misspelt."""
    seen = set().union(*(one.seen for one in opened))
    for ours, theirs in source.columns.items():
        if seen and theirs not in seen:
            fix = f"it has {', '.join(sorted(map(str, seen))[:20])}"
            raise UserError(f"data: columns.{ours} names {shown(theirs)}, which no record of {source.path} has ({fix})")


def root_of(source: TrainSource, config: DataConfig) -> Path | None:
    """The folder that a source's image paths start from, symlinks resolved; None: none is named."""
    root = source.root or config.root
    if root is None:
        return None
    folder = Path(root).resolve()
    if not folder.is_dir():
        key = f"root of {source.path}" if source.root else "data.root"
        raise UserError(f"data: {key}: {root} is not a folder (give the folder that the image paths start from)")
    return folder


@cache
def _scratch() -> Path:
    """A folder of this process, removed when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="ds_moe_data_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
