"""A folder of encoded records, opened: one record by its index."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from ds_moe.config.run import RunConfig
from ds_moe.data.digits import Split
from ds_moe.data.encode import Encoded
from ds_moe.data.fingerprint import Facts, Fingerprint, key_of
from ds_moe.data.prepared.shards import Damaged, read_record
from ds_moe.data.prepared.stamps import Stamp, is_of, stamps_in
from ds_moe.data.records import DATA_CACHE
from ds_moe.errors import one_line
from ds_moe.weights.files import MappedFiles

FORMAT = 2
INDEX, COUNTS = "index.json", "counts.safetensors"
MAPPED = 2**28  # bytes of records read before a process lets go of the files' pages


@dataclass
class Prepared:
    """The encoded records of one data file, by index.

    Attributes:
        folder: where they are.
        tokens, patches: (records,) int64, 0 tokens for a record that cannot be used.
        bad: why, by index.
        pixels: whether images are stored too.
        problem: why the last record that was asked for is not there, where that is worth a line; None: nothing is.
    """

    folder: Path
    index: Facts
    tokens: np.ndarray
    patches: np.ndarray
    bad: dict[int, str]
    problem: str | None = None
    _files: MappedFiles | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.unstored = set(self.index["unstored"])  # records that are encoded by every run: they have videos
        self._starts = np.array(self.index["starts"], dtype=np.int64)

    def __getstate__(self) -> Facts:
        """Loading processes open the files themselves."""
        return {**vars(self), "_files": None}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def pixels(self) -> bool:
        return self.index["pixels"]

    def encoded(self, index: int, form: type[Encoded], stamps: Callable[[], list[Stamp] | None]) -> Encoded | None:
        """A record, an object of the class `form`; None where it must be encoded. One whose images are not stored has
        a grid of them and no `pixel_values`; one whose images are stored has the stamps `stamps` of their files."""
        self.problem = None
        if index in self.bad or index in self.unstored or self.index["form"] != form.__name__:
            return None
        if self._files is None:
            self._files = MappedFiles(MAPPED)
        number = int(self._starts.searchsorted(index, side="right")) - 1
        try:
            file = self.folder / self.index["shards"][number]
            stored = read_record(self._files, file, index - int(self._starts[number]), form)
        except (Damaged, IndexError) as error:
            self.problem = str(error)
            return None
        if not is_of(stored, index):
            self.problem = f"{file} was made anew since"
            return None
        if stored.encoded.pixel_values is not None and stamps() != stamps_in(stored):
            self.problem = f"an image of record {index} has changed since"
            return None
        return stored.encoded

    def __str__(self) -> str:
        what = "with images" if self.pixels else "without images"
        return f"{self.folder}, {len(self):,} records{f' {what}' if self.patches.any() else ''}"


def prepared_in(config: RunConfig) -> Path:
    """The folder in which a run looks for prepared data."""
    return Path(config.data.prepared or Path(config.train.output_dir, DATA_CACHE, "prepared"))


def folder_of(config: RunConfig, split: Split, made_of: Fingerprint) -> Path:
    return prepared_in(config) / f"{split}-{key_of(made_of)[:16]}"


def open_prepared(folder: Path, made_of: Fingerprint) -> Prepared:
    """Raises `Damaged` where a file is missing, has another size, or the index is not what was written."""
    index = read_index(folder)
    if key_of(index["made_of"]) != key_of(made_of):
        raise Damaged(f"{folder / INDEX} is of other data")
    for name, (size, _) in index["files"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise Damaged(f"{folder / name} is missing or has another size")
    if sha256_of(folder / COUNTS) != index["files"][COUNTS][1]:
        raise Damaged(f"{folder / COUNTS} is not what was written")
    try:
        files = MappedFiles(MAPPED)
        tokens, patches = (files.read(folder / COUNTS, name).numpy().copy() for name in ("tokens", "patches"))
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{folder / COUNTS} cannot be read ({one_line(error)})") from error
    return Prepared(folder, index, tokens, patches, {int(number): why for number, why in index["bad"].items()})


def read_index(folder: Path) -> Facts:
    """The index of a folder. Raises `Damaged` where it is not what was written."""
    try:
        written = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index, sha256 = written["index"], written["sha256"]
        if digest_of(index) != sha256 or index["format"] != FORMAT:
            raise ValueError("its digest is another one, or its format")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{folder / INDEX} is not what was written ({one_line(error)})") from error
    return index


def digest_of(index: Facts) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
