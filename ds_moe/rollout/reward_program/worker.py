"""A worker, as the keeper sees it: forked, asked, ended."""

import json
import os
import select
import signal
import time
from contextlib import suppress
from typing import NoReturn

from ds_moe.rollout.reward_program.code import edited_module
from ds_moe.rollout.reward_program.processes import below
from ds_moe.rollout.reward_program.protocol import Json, PipeLines, Settings, TrainerGone, WorkerFailed
from ds_moe.rollout.reward_program.serve import CLOSED, run_worker

ENDS_A_WORKER = ("import", "MemoryError")  # failures after which a worker that answers is of no use
LINE = 1 << 22  # bytes of one answer of the worker
TAIL = 2000  # bytes of what a worker printed last
WAKES_S = 0.05  # between two looks at whether the worker is alive
MOST_BELOW = 256  # processes that functions may leave running


class Worker:
    """A forked process that has imported the functions, and the pipes to it.

    Attributes:
        code: that they are made of, see `code_of`.
    """

    def __init__(self, settings: Settings, trainer: int) -> None:
        """Raises `WorkerFailed` where a function cannot be imported, or its code is not that of an earlier worker."""
        self._settings, self._trainer, self._parent, self._turn = settings, trainer, os.getppid(), 0
        self._tail, self._status = b"", None
        ask, self._ask = os.pipe()
        self._answers, answer = os.pipe()
        self._printed, printed = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            run_worker(settings, ask, answer, printed)
        for fd in (ask, answer, printed):
            os.close(fd)
        os.set_blocking(self._ask, False)
        os.set_blocking(self._printed, False)
        self._lines = PipeLines(self._answers, LINE)
        try:
            found = self._wait(b"", settings["import_s"]).get("code")
            self.code: dict[str, str] = found if isinstance(found, dict) else {}
            before = settings.get("code")
            if before is not None and (edited := edited_module(before, self.code)):
                raise WorkerFailed("was edited", f"{edited} has changed since the run began: start the run again")
            settings["code"] = self.code
        except BaseException:
            self._close()
            raise

    def call(self, case: Json) -> Json:
        """The answer to one case. The worker is not to be used any more after a `WorkerFailed`."""
        self._turn += 1
        if self._turn % MOST_BELOW == 0 and len(below(self._pid)) > MOST_BELOW:
            self._close()
            raise WorkerFailed("left processes behind", f"left more than {MOST_BELOW} processes behind")
        request = json.dumps({**case, "turn": self._turn}).encode() + b"\n"
        try:
            return self._wait(request, self._settings["timeout_s"])
        except BaseException:
            self._close()
            raise

    def is_gone(self) -> bool:
        """Whether the worker has ended by itself, after its last answer."""
        gone = self._exit_status() is not None
        if gone:
            self._close()
        return gone

    def _exit_status(self) -> int | None:
        """As waitpid(2) has it; None: the worker is alive."""
        if self._status is None:
            ended, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = status if ended else None
        return self._status

    def _close(self) -> None:
        for fd in (self._ask, self._answers, self._printed):
            os.close(fd)

    def _wait(self, request: bytes, limit_s: float) -> Json:
        """Send the request and wait for its answer; each function that begins has `limit_s` from then on."""
        deadline, name = time.monotonic() + limit_s, ""
        while True:
            while (line := self._lines.take()) is not None:
                answer = _parsed(line)
                if answer.get("turn") != self._turn:
                    continue  # of a forked copy of the worker that came late
                if "begin" in answer:
                    deadline, name = time.monotonic() + limit_s, str(answer["begin"])
                elif answer.get("kind") in ENDS_A_WORKER:
                    raise WorkerFailed(str(answer["kind"]), str(answer["error"]), str(answer["name"]))
                else:
                    return {key: value for key, value in answer.items() if key != "turn"}
            left = deadline - time.monotonic()
            if left <= 0:
                raise WorkerFailed("took too long", f"took longer than {limit_s:g} s", name)
            request = self._turn_of_pipes(request, min(left, WAKES_S), name)

    def _turn_of_pipes(self, request: bytes, wait_s: float, name: str) -> bytes:
        """Read and write what can be; the rest of the request."""
        gone = self._exit_status() is not None  # looked at first: all that it answered is in the pipe by then
        reads, writes, _ = select.select(
            [self._trainer, self._answers, self._printed], [self._ask] if request else [], [], 0 if gone else wait_s
        )
        if self._trainer in reads or os.getppid() != self._parent:  # the trainer sends nothing while it waits
            raise TrainerGone
        if self._printed in reads:
            self._read_printed()
        if self._ask in writes:
            try:
                request = request[os.write(self._ask, request[: 1 << 16]) :]
            except BrokenPipeError:
                request = b""
        if self._answers in reads:
            if not self._lines.read():
                self._ended(name)
        elif gone:  # a forked copy may hold the pipe of its answers open
            self._ended(name)
        return request

    def _read_printed(self) -> None:
        with suppress(BlockingIOError):
            self._tail = (self._tail + os.read(self._printed, 1 << 16))[-TAIL:]

    def _ended(self, name: str) -> NoReturn:
        """Raise what is known of a worker that will not answer any more."""
        how = "closed the pipe of its answers"
        deadline = time.monotonic() + 1
        while (status := self._exit_status()) is None and time.monotonic() < deadline:  # it may be on its way out
            time.sleep(0.01)
        self._read_printed()
        if status is not None and status != CLOSED << 8:
            code = os.waitstatus_to_exitcode(status)
            how = f"ended its process with status {code}" if code >= 0 else f"died of {signal.Signals(-code).name}"
        last = self._tail.decode(errors="replace").strip().splitlines()
        raise WorkerFailed(how, how + (f"; it printed last: {last[-1][-200:]}" if last else ""), name)


def _parsed(line: bytes) -> Json:
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise WorkerFailed("wrote into the pipe", "wrote into the pipe of its answers")
    return answer
