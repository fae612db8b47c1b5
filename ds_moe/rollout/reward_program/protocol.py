"""What the trainer, the keeper and the worker tell each other, line by line."""

import os
from typing import NotRequired, TypedDict

Json = dict[str, object]


class Settings(TypedDict):
    """What the trainer says first. A function is as `find_function` reads it, with its "name"."""

    functions: list[Json]
    timeout_s: float  # of a call of one function
    import_s: float  # of the import of one
    memory: int  # bytes of data of the worker
    code: NotRequired[dict[str, str] | None]  # of an earlier worker, see `code_of`


class WorkerFailed(Exception):
    """What the keeper answers in place of values: `kind` tells failures apart, `error` is for a person."""

    def __init__(self, kind: str, error: str, name: str = "") -> None:
        super().__init__(error)
        self.answer: Json = {"kind": kind, "error": error, "name": name}


class TrainerGone(Exception):
    """The trainer has closed its end, or died."""


class PipeLines:
    """The lines of a pipe, read as they come.

    Args:
        longest: bytes of what may be held; None: any number.
    """

    def __init__(self, fd: int, longest: int | None = None) -> None:
        self.fd, self._longest, self._held = fd, longest, bytearray()

    def read(self) -> bool:
        """Take in what is there; whether the other end is open. Raises `WorkerFailed` beyond `longest`."""
        data = os.read(self.fd, 1 << 16)
        self._held += data
        if self._longest and len(self._held) > self._longest:
            raise WorkerFailed("wrote into the pipe", "wrote into the pipe of its answers")
        return bool(data)

    def take(self) -> bytes | None:
        """The next whole line; None: there is none yet."""
        line, newline, rest = self._held.partition(b"\n")
        if not newline:
            return None
        self._held = bytearray(rest)
        return bytes(line)

    def next(self) -> bytes | None:
        """Wait for the next line; None: the other end is closed."""
        while (line := self.take()) is None:
            if not self.read():
                return None
        return line
