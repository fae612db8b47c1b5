"""From the path of a source to the data files that it means, in a fixed order."""

import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from ds_moe.config.sections import SourceConfig
from ds_moe.data.images import ImageRoot
from ds_moe.errors import UserError, shown

Form = Literal["jsonl", "parquet", "arrow", "tar"]
FORMS: dict[str, Form] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".tar": "tar",
}
COMPRESSED = (".gz", ".zst", ".zstd")
MOST_FILES = 100_000  # of a source
MAX_JSON = 2**24  # bytes of a file that describes a saved dataset
SHARD = re.compile(  # the hash is that of older versions of `push_to_hub`
    r"^(?P<before>.*?)(?P<number>\d{5,})-of-(?P<count>\d{5,})(?:-[0-9a-f]+)?(?P<after>\..*)$"
)


@dataclass(frozen=True)
class DataFile:
    """One file of a source.

    Attributes:
        name: as messages show it; behind it stands ":" and the number of a line or row, or the name of a member.
        root: what its image paths start from, unless the run file names a folder for this source; None: its own folder.
    """

    path: Path
    name: str
    form: Form
    compressed: bool = False
    root: Path | ImageRoot | None = None


def local_files(source: SourceConfig) -> list[DataFile]:
    """The files of a source on this machine, sorted by path.

    Raises:
        UserError: there are none, one of them is no data file, they are of several forms, or a shard is missing.
    """
    path = Path(source.path)
    if is_folder(path):
        return _in_folder(path, source)
    if source.split is not None:
        fix = "only a hub dataset and a folder of `save_to_disk` have splits; remove it"
        raise UserError(f"data: split {shown(source.split)} would not be used: {source.path} has none ({fix})")
    if exists(path) or not set(source.path) & set("*?[{"):
        return [data_file(path, source.path)]
    found: list[str] = []
    for pattern in braces(source.path):
        matching = sorted(glob.glob(pattern, recursive=True))
        if not matching:
            of = f", of {source.path}" if pattern != source.path else ""
            raise UserError(f"data: {pattern}{of} matches no file (correct the pattern)")
        found += matching
    return one_form([data_file(Path(one), one) for one in dict.fromkeys(found)], source.path)


def data_file(path: Path, name: str) -> DataFile:
    """A file by its ending. Raises `UserError` for one that is missing, no regular file, or of no known form."""
    if not (exists(path) and path.is_file()):  # reading a pipe or a device might never end
        what = "is no regular file" if exists(path) else "does not exist"
        raise UserError(f'data: {name} {what} (give a JSONL or Parquet file, or "digits")')
    endings = path.suffixes[-2:]
    compressed = endings[-1:] != [] and endings[-1] in COMPRESSED
    form = FORMS.get(endings[-2] if compressed and len(endings) == 2 else "" if compressed else path.suffix)
    if form is None or (compressed and form != "jsonl"):
        if form is None:
            reason, fix = "is neither .jsonl nor .parquet nor .tar", "convert it, or rename it"
        else:
            reason = f"is a compressed .{form}, whose records cannot be read one by one"
            fix = "unpack it"
        raise UserError(f"data: {name} {reason} ({fix})")
    return DataFile(path, name, form, compressed)


def one_form(files: list[DataFile], of: str) -> list[DataFile]:
    """These files. Raises `UserError` where they are of several forms."""
    forms: dict[Form, DataFile] = {}
    for file in files:
        forms.setdefault(file.form, file)
    if len(forms) > 1:
        first, second, *_ = forms.values()
        raise UserError(f"data: {of} holds {first.name} and {second.name} (give a pattern for one of the two forms)")
    return files


def check_shards(files: list[DataFile], of: str) -> None:
    """Raise `UserError` where one of shards that say how many there are (x-00003-of-00008.parquet) is missing."""
    found: dict[tuple[str, str, str], set[int]] = {}
    for file in files:
        if match := SHARD.match(file.name):
            series = match["before"], match["count"], match["after"]
            found.setdefault(series, set()).add(int(match["number"]))
    for (before, count, after), numbers in found.items():
        if len(numbers) < int(count):
            first = next(number for number in range(int(count)) if number not in numbers)
            name = f"{before}{first:0{len(count)}}-of-{count}{after}"
            text = f"data: {of} lacks {int(count) - len(numbers)} of {int(count)} shards, the first {name}"
            raise UserError(f"{text} (complete it, or name the files by a pattern)")


def _in_folder(folder: Path, source: SourceConfig) -> list[DataFile]:
    if (folder / "dataset_dict.json").is_file():
        splits = _described(folder / "dataset_dict.json", "splits")
        wanted = source.split or (splits[0] if len(splits) == 1 else None)
        if wanted not in splits:
            which = f"no split {shown(wanted)}" if wanted else "several splits"
            raise UserError(f"data: {folder} has {which} (set split to one of {', '.join(splits)})")
        return saved_dataset(folder / wanted)
    if source.split is not None:
        text = f"data: split {shown(source.split)} would not be used: {folder} is no saved DatasetDict"
        raise UserError(f"{text} (remove it)")
    if (folder / "state.json").is_file():
        return saved_dataset(folder)
    found = [data_file(path, str(path)) for path in _walk(folder)]
    if not found:
        fix = "give a file, or a folder with .jsonl, .parquet or .tar files, or one of `save_to_disk`"
        raise UserError(f"data: {folder} is no regular file, and a folder without data files ({fix})")
    check_shards(one_form(found, str(folder)), str(folder))
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """Data files in a folder and those below it, sorted, without hidden ones.

    Raises:
        UserError: a folder cannot be read, or is a link, of which nobody knows whether it leads back.
    """
    paths = []

    def refuse(error: OSError) -> None:
        raise UserError(f"data: {error.filename} cannot be read ({error.strerror})") from error

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        if link := next((Path(place, name) for name in sorted(folders) if Path(place, name).is_symlink()), None):
            fix = "name what it leads to as a source of its own, or give a pattern"
            raise UserError(f"data: {link} is a link to a folder, which is not followed ({fix})")
        paths += [Path(place, name) for name in names if is_data(name) and not name.startswith((".", "__"))]
        if len(paths) > MOST_FILES:
            raise UserError(f"data: {folder} holds more than {MOST_FILES:,} data files (name some by a pattern)")
    yield from sorted(paths)


def is_data(name: str) -> bool:
    """Whether a file of this name may hold records; a .json among others is most likely a description of them."""
    path = Path(name)
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix in FORMS.keys() - {".json"}


def saved_dataset(folder: Path) -> list[DataFile]:
    """The Arrow files of a folder that `datasets.Dataset.save_to_disk` has written, in their order."""
    names = [
        one.get("filename") if isinstance(one, dict) else one
        for one in _described(folder / "state.json", "_data_files")
    ]
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".arrow"):
            raise UserError(
                f"data: {folder / 'state.json'} names {shown(name)}, no Arrow file beside it (save it again)"
            )
        path = folder / name
        if not (exists(path) and path.is_file()):
            raise UserError(f"data: {path} does not exist (complete the folder, or save it again)")
        files.append(DataFile(path, str(path), "arrow"))
    if not files:
        raise UserError(f"data: {folder} holds no records (save it again)")
    return files


def _described(file: Path, key: str) -> list:
    """A list out of a small JSON file of a saved dataset."""
    try:
        if file.stat().st_size > MAX_JSON:
            raise ValueError(f"it has more than {MAX_JSON} bytes")
        value = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or not isinstance(value.get(key), list):
            raise ValueError(f"it has no list {key!r}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"data: {file} is not as `save_to_disk` writes it: {error} (save the dataset again)") from error
    if key == "splits" and not all(isinstance(one, str) and Path(one).name == one for one in value[key]):
        raise UserError(f"data: {file} names splits that are no folders beside it (save the dataset again)")
    return value[key]


def braces(pattern: str) -> list[str]:
    """The patterns that {a,b} and {000..127} in one stand for, as a shell writes them out.

    Raises:
        UserError: more than MOST_FILES.
    """
    pieces: list[list[str]] = []
    for number, piece in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        if number % 2 == 0:
            pieces.append([piece])
        elif (span := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", piece)) is not None:
            first, last = int(span[1]), int(span[2])
            if abs(last - first) >= MOST_FILES:
                raise UserError(f"data: {shown(pattern)} names more than {MOST_FILES:,} files (write fewer)")
            width = max(len(span[1]), len(span[2])) if span[1].startswith("0") or span[2].startswith("0") else 0
            step = 1 if last >= first else -1
            pieces.append([f"{value:0{width}}" for value in range(first, last + step, step)])
        elif "," in piece:
            pieces.append(piece.split(","))
        else:
            pieces.append([f"{{{piece}}}"])
    count = 1
    for piece in pieces:
        count *= len(piece)
    if count > MOST_FILES:
        raise UserError(f"data: {shown(pattern)} names more than {MOST_FILES:,} files (write fewer)")
    return ["".join(chosen) for chosen in product(*pieces)]


def exists(path: Path) -> bool:
    """`Path.exists`, which raises for names that are too long or hold a NUL."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    return exists(path) and path.is_dir()
