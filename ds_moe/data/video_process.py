"""The process that opens video files (see video_worker.py), as the trainer sees it: started, asked, ended."""

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ds_moe.data.images import RecordError
from ds_moe.errors import UserError, one_line, shown

WORKER = Path(__file__).with_name("video_worker.py")
START_S = 60.0  # for the import of PyAV
LATE = "saying nothing"
NONSENSE = "writing what is no answer"
LINE = 2**16  # bytes of an answer without its pixels
MOST = 2**31  # of anything that is counted
# What the process needs of the environment; nothing that makes it a rank or gives it an accelerator.
KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")


class VideoProcess:
    """A worker and the pipes to it. It is used by the process that made it, one question at a time."""

    def __init__(self, timeout_s: float, memory: int, program: Path = WORKER) -> None:
        """Nothing is started before the first question.

        Args:
            timeout_s: that the worker may take for one question, pauses in which it is not read from left out.
            memory: bytes of data that it may have.
        """
        self._timeout_s, self._memory, self._program = timeout_s, memory, program
        self._worker: subprocess.Popen[bytes] | None = None
        self._held = b""

    def look(self, question: dict[str, Any], data: bytes | None, name: str) -> dict[str, Any]:
        """What a file holds. Raises `RecordError` for one that cannot be used, `UserError` without PyAV."""
        for told, _ in self._answers({"ask": "look", **question}, data, name, 1):
            return told
        raise AssertionError("one answer is given or an error raised")

    def frames(
        self, question: dict[str, Any], data: bytes | None, name: str, indices: Sequence[int]
    ) -> Iterator[np.ndarray]:
        """Frames of ascending indices, (height, width, 3) uint8. Raises as `look`."""
        asked = {"ask": "frames", "indices": list(indices), **question}
        for told, pixels in self._answers(asked, data, name, len(indices)):
            yield np.frombuffer(pixels, np.uint8).reshape(told["height"], told["width"], 3)

    def _answers(
        self, question: dict[str, Any], data: bytes | None, name: str, count: int
    ) -> Iterator[tuple[dict[str, Any], bytes]]:
        if data is not None:
            question["bytes"] = len(data)
        left_s, given = self._timeout_s, 0
        try:
            self._start()
            began = time.monotonic()
            self._send(json.dumps(question).encode() + b"\n", left_s)
            self._send(data or b"", left_s - (time.monotonic() - began))
            left_s -= time.monotonic() - began
            while given < count:
                began = time.monotonic()
                told, pixels = self._answer(left_s, question)
                left_s -= time.monotonic() - began
                if "error" in told:
                    given = count  # it waits for the next question
                    raise RecordError(f"video {shown(name)} {told['error']}")
                given += 1
                yield told, pixels
        except _Lost as lost:
            raise RecordError(f"video {shown(name)} {self._why(lost)}") from None
        finally:
            if given < count:  # the rest of an answer may be on its way
                self.close()

    def _start(self) -> None:
        if self._worker is not None and self._worker.poll() is None:
            return
        self.close()
        # Neither the folder of the program nor the one that the trainer was started in has a say in what is imported.
        run = "import sys; sys.path[:] = filter(None, sys.path)"
        run += f"; import runpy; runpy.run_path({str(self._program)!r}, run_name='__main__')"
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        self._worker = subprocess.Popen(
            [sys.executable, "-c", run],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # a terminal's Ctrl-C is for the trainer
        )
        os.set_blocking(self._worker.stdin.fileno(), False)
        self._held = b""
        try:
            settings = {"memory": self._memory, "timeout_s": self._timeout_s}
            self._send(json.dumps(settings).encode() + b"\n", START_S)
            told, _ = self._answer(START_S)
        except _Lost as lost:
            raise UserError(f"data: the decoder of videos does not start: it ended {self._end(lost)}") from None
        if "error" in told:
            self.close()
            fix = "pip install 'ds-moe[video]'" if told.get("missing") else "see the reason"
            raise UserError(f"data: videos are decoded by PyAV: {one_line(told['error'])} ({fix})")

    def _send(self, sent: bytes, limit_s: float) -> None:
        """Write to a worker that reads. That it has ended is found when it is read from."""
        deadline, into, left = time.monotonic() + limit_s, self._worker.stdin.fileno(), memoryview(sent)
        with selectors.DefaultSelector() as selector, suppress(BrokenPipeError):
            selector.register(into, selectors.EVENT_WRITE)
            while left:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    raise _Lost(LATE)
                left = left[os.write(into, left[: 1 << 20]) :]

    def _answer(self, limit_s: float, question: dict[str, Any] | None = None) -> tuple[dict[str, Any], bytes]:
        """The next line, and the pixels behind it. Without a question, what a worker says at its start."""
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._held:
            if len(self._held) > LINE:
                raise _Lost(NONSENSE)
            self._held += self._read(deadline)
        line, _, self._held = self._held.partition(b"\n")
        try:
            told = json.loads(line)
        except (ValueError, RecursionError):
            raise _Lost(NONSENSE) from None
        size = _bytes_behind(told, question)
        parts, missing = [self._held[:size]], size - len(self._held)
        self._held = self._held[size:]
        while missing > 0:
            part = self._read(deadline)
            parts.append(part[:missing])
            self._held, missing = part[missing:], missing - len(part)
        return told, b"".join(parts)

    def _read(self, deadline: float) -> bytes:
        out = self._worker.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(out, selectors.EVENT_READ)
            if not selector.select(max(deadline - time.monotonic(), 0)):
                raise _Lost(LATE)
        data = os.read(out, 1 << 20)
        if not data:
            raise _Ended
        return data

    def _why(self, lost: "_Lost") -> str:
        """End the worker; what that says about a file, with the fix."""
        if (how := self._end(lost)) == LATE:
            return f"took more than data.video.timeout_s {self._timeout_s:g} to decode (shorten it, or raise the limit)"
        return f"ended its decoder {how} (write it again, or raise data.video.memory_gb)"

    def _end(self, lost: "_Lost") -> str:
        """End the worker; what happened to it."""
        if lost.ended:
            with suppress(subprocess.TimeoutExpired):
                self._worker.wait(5.0)
        code = self._worker.poll()
        self.close()
        if code is None:
            return str(lost)
        return f"by signal {signal.Signals(-code).name}" if code < 0 else f"with status {code}"

    def close(self) -> None:
        """End the worker. The next question starts another one."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            with suppress(OSError):  # what was not sent yet is of no use
                pipe.close()


def _bytes_behind(told: object, question: dict[str, Any] | None) -> int:
    """Of pixels, behind a line. Raises `_Lost` for one that does not answer the question: its decoder may be broken."""
    if not isinstance(told, dict):
        raise _Lost(NONSENSE)
    if isinstance(told.get("error"), str) or (question is None and "ready" in told):
        return 0
    height, width, frames, fps = (told.get(key) for key in ("height", "width", "frames", "fps"))
    if question is None or not (_count(height) and _count(width)):
        raise _Lost(NONSENSE)
    looked = question["ask"] == "look"
    if looked and not (_count(frames, 0) and type(fps) is float and 0 < fps < MOST):
        raise _Lost(NONSENSE)
    if not looked and height * width > question.get("max_pixels", MOST):
        raise _Lost(NONSENSE)
    return 0 if looked else height * width * 3


def _count(value: object, least: int = 1) -> TypeGuard[int]:
    return type(value) is int and least <= value < MOST


class _Lost(Exception):
    """The worker says nothing, or has ended."""

    ended = False


class _Ended(_Lost):
    ended = True


def video_process(timeout_s: float, memory: int) -> VideoProcess:
    """The worker of this process; forks of it have their own."""
    return _of_process(os.getpid(), timeout_s, memory)


@lru_cache(maxsize=2)
def _of_process(pid: int, timeout_s: float, memory: int) -> VideoProcess:
    made = VideoProcess(timeout_s, memory)
    atexit.register(made.close)
    return made
