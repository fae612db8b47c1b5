"""Signals that end a run at the end of a step, with a checkpoint.

A signal may reach one rank only, or reach the ranks in different steps. Every step has an all-reduce anyway; in it the
ranks tell each other what they have received, and so all stop after the same step. The exit status is 128 + the signal,
as in shells.
"""

import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """A signal has ended the run, and the checkpoint is written."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}")
        self.signal = number
        self.exit_status = 128 + number


class StopRequest:
    """Records the signals that this rank receives. Make it in the main thread; it replaces the handlers until `close`.

    Before `wait_for_step` is called, a signal ends the process at once, which the message explains with `at_once`, and
    `leftovers`, files and folders that are of no use then, are removed.
    Afterwards a signal is only recorded, and the process has `deadline_s` to end by itself; a second SIGINT ends it at
    once, because somebody pressed Ctrl-C again.

    Python runs its handlers only between two of its own instructions, which can be long after the signal, for example
    if the main thread waits in a collective. C code can wake another thread at once: Python's C handler writes the
    number of the signal to a socket, and a thread of this class reads it. `where` says what the rank is doing.
    """

    def __init__(
        self, rank: int, deadline_s: float, where: Callable[[], str], at_once: str = "before the first step"
    ) -> None:
        self.rank, self.deadline_s, self.where = rank, deadline_s, where
        self.received: signal.Signals | None = None
        self._at_once, self._why_at_once = True, at_once
        self.leftovers: list[Path] = []
        self._sender, self._receiver = socket.socketpair()
        self._sender.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _noted) for number in SIGNALS}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def wait_for_step(self) -> None:
        """From now on, let the step end before the process ends."""
        self._at_once = False

    def close(self) -> None:
        """Restore the handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._sender.close()  # ends `_listen`

    def _listen(self) -> None:
        while numbers := self._receiver.recv(1):
            number = numbers[0]
            if number in SIGNALS and self._at_once:
                self._say(f"received {signal.Signals(number).name} {self._why_at_once}: ending")
                for path in self.leftovers:
                    with suppress(OSError):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                os._exit(128 + number)
            elif number in SIGNALS and self.received is None:
                self.received = signal.Signals(number)
                self._say(f"received {self.received.name} in {self.where()}: a checkpoint follows at the step's end")
                timer = threading.Timer(self.deadline_s, self._end)
                timer.daemon = True
                timer.start()
            elif number == signal.SIGINT == self.received:
                self._say("received SIGINT again: ending without a checkpoint")
                os._exit(128 + number)

    def _end(self) -> None:
        assert self.received is not None
        self._say(
            f"still in {self.where()} {self.deadline_s:g} s (train.stop_within_s) after {self.received.name}: ending; "
            "the newest checkpoint is an earlier one"
        )
        os._exit(128 + self.received)

    def _say(self, text: str) -> None:
        print(f"rank {self.rank}: {text}", file=sys.stderr, flush=True)

    def votes(self) -> list[float]:
        """One number for each of `SIGNALS`, 1 for the one that this rank received; to be summed over the ranks."""
        return [float(number == self.received) for number in SIGNALS]


def agreed(votes: Sequence[float]) -> signal.Signals | None:
    """The signal that all ranks obey, given the sums of their votes; None: nobody received one."""
    return next((number for number, count in zip(SIGNALS, votes, strict=True) if count), None)


def leave_to_parent(_: int = 0) -> None:
    """Make a data worker ignore signals, so that its rank decides when it ends: launchers signal every process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def left_to_parent() -> Iterator[None]:
    """Processes that are started inside ignore signals until they handle them, and hand that on to their children.

    This process misses none: its other threads take what this one blocks.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _noted(number: int, frame: FrameType | None) -> None:
    """Do nothing: Python's C handler has already written to the socket."""
