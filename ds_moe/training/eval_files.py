"""The two files of an evaluation: nobody else's file is replaced, none is written through a link or half."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

FIRST_BYTES = 2**20  # that are read of a file to know whose it is


def result_file(samples: Path) -> Path:
    return samples.with_suffix(".json")


def not_replaceable(samples: Path) -> str | None:
    """Why an evaluation must not write its files there: one of them is something else already. None: it may."""
    for file, keys in ((samples, ("where", "prediction")), (result_file(samples), ("from", "eval_loss"))):
        what = "a link" if file.is_symlink() else "a folder" if file.is_dir() else None
        if what is None and file.exists() and not all(f'"{key}": ' in _beginning(file) for key in keys):
            what = "there already, and no evaluation has written it"
        if what is not None:
            return f"{file} is {what}; give --out another name"
    return None


def _beginning(file: Path) -> str:
    with file.open("rb") as found:
        return found.read(FIRST_BYTES).decode(errors="replace").partition("\n{")[0]


def partial_of(file: Path) -> Path:
    """Where a file is written until it is complete: each process has a place of its own."""
    return file.with_name(f"{file.name}.{os.getpid()}.partial")


@contextmanager
def written_whole(file: Path) -> Iterator[TextIO]:
    """The file has its name once the block has ended, and is not there after an error."""
    partial = partial_of(file)
    partial.unlink(missing_ok=True)  # it may be a link, which `open` would write through
    try:
        with partial.open("x", encoding="utf-8") as lines:
            yield lines
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def write_result(result: dict[str, object], file: Path) -> None:
    with written_whole(file) as text:
        json.dump(result, text, indent=1)
