"""A data file as it was when the run opened it: its records are found by offsets that hold for nothing else."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ds_moe.errors import UserError

CHANGED = "has changed since the run opened it (leave data files alone while it trains)"


@dataclass(frozen=True)
class FileAsOpened:
    """Attributes:
    name: as messages show it.
    size: bytes.
    mtime_ns: when it was last written to.
    """

    path: Path
    name: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path, name: str) -> "FileAsOpened":
        """Raises `UserError` where it cannot be asked."""
        with readable(name):
            found = path.stat()
        return cls(path, name, found.st_size, found.st_mtime_ns)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Its bytes. Raises `UserError` where it has changed, or cannot be read."""
        with readable(self.name), self.path.open("rb") as stream:
            self._compare(os.fstat(stream.fileno()))
            yield stream

    def check(self) -> None:
        """Raise `UserError` where it has changed or has gone; after a read, that what was read is what was opened."""
        with readable(self.name):
            self._compare(self.path.stat())

    def _compare(self, found: os.stat_result) -> None:
        if (found.st_size, found.st_mtime_ns) != (self.size, self.mtime_ns):
            raise UserError(f"{self.name}: {CHANGED}")


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turns what the system says of a file, such as of its permissions, into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"data: {name} cannot be read ({error.strerror or error})") from error
