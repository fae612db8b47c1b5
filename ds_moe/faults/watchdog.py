"""The job's watchdog: a rank that dies, hangs or makes no progress ends the job on every host, and is named.

The training thread says at every turn where it is (`at("backward", step=12)`). A first thread of the watchdog writes
that to the job's store and reads where the other ranks are. A second thread judges, because the first may be waiting
for a host that is gone. Both run while the training thread waits in a collective.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import count
from typing import NoReturn, TypedDict

import torch.distributed as dist

from ds_moe.errors import UserError

STALLED = 3  # exit status of a rank whose watchdog has ended it
SILENCE = 0.75  # share of the limit for which a rank may be silent; a live rank speaks many times in it
CHECKS = 20  # how often a rank speaks, and is judged, within the limit
LEAVE_S = 2.0  # seconds that a rank which leaves waits for the store
_runs = count()  # numbers the runs of this process, because each has its own keys in the store


@dataclass(frozen=True)
class Place:
    """Where a rank's training thread is."""

    turn: int  # counts up. The ranks of a job take the same turns, so the ranks with the lowest turn are behind
    step: int
    phase: str
    since: float  # when it last moved, by `time.monotonic`
    timed: bool  # whether the limit applies to this place

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step else self.phase


class News(TypedDict):
    """What a rank writes to the store, as JSON."""

    spoken: int  # counts up, so that each text differs from the last
    turn: int
    since: float  # by the clock of that rank
    place: str
    host: str
    done: bool  # the rank has finished its run, and will say no more


@dataclass
class Heard:
    """What this rank last heard of another one. Times are of this rank's `time.monotonic`."""

    at: float  # when it said something new
    since: float  # since when it has been in the same place
    text: bytes = b""
    news: News | None = None

    def __str__(self) -> str:
        return f"({self.news['host']}), last in {self.news['place']}" if self.news else "(never heard of)"

    @property
    def done(self) -> bool:
        return self.news is not None and self.news["done"]

    @property
    def turn(self) -> int:
        return self.news["turn"] if self.news else 0


class Watchdog:
    """Watches this rank and, through the job's store, all others.

    Args:
        store: the job's store. The watchdog uses a clone, so that it never waits for another user of the store.
        limit_s: seconds that a rank may take for one turn. A rank may be silent for the share `SILENCE` of it.
        end: called with the lines of the verdict; must not return. The default ends this process with the status
            `STALLED`, upon which the launcher ends the other processes of this host.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        limit_s: float,
        end: Callable[[list[str]], object] | None = None,
    ) -> None:
        self.limit_s, self.silence_s, self.interval_s = limit_s, SILENCE * limit_s, limit_s / CHECKS
        self.rank, self._end = rank, end or self._end_process
        self.place = Place(0, 0, "start", time.monotonic(), timed=False)
        self._store = store.clone()
        self._store.set_timeout(timedelta(seconds=self.silence_s))
        run = next(_runs)
        self._keys = [f"watchdog/{run}/{other}" for other in range(world_size)]
        self._heard = [Heard(time.monotonic(), time.monotonic()) for _ in self._keys]
        self._answered = time.monotonic()  # when the store last answered
        self._spoken = 0
        self._closed = threading.Event()
        self._watched_thread = threading.get_ident()
        self._threads: list[threading.Thread] = []

    def start(self) -> Watchdog:
        """Begin to watch (collective: the barrier lets every rank speak before any listens)."""
        self._speak()
        dist.barrier()
        for work in (self._talk, self._judge):
            thread = threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def at(self, phase: str, step: int | None = None, timed: bool = True) -> None:
        """The training thread takes its next turn. Without `step`, the step stays what it was."""
        step = self.place.step if step is None else step
        self.place = Place(self.place.turn + 1, step, phase, time.monotonic(), timed)

    def pulse(self) -> None:
        """The training thread moves on within its turn. Other ranks may have ended theirs already."""
        self.place = replace(self.place, since=time.monotonic())

    @contextmanager
    def telling_place(self) -> Iterator[None]:
        """Errors from inside say where this rank was; what the system refused is a `UserError`."""
        try:
            yield
        except OSError as error:
            raise UserError(f"rank {self.rank} in {self.place}: {error}") from error
        except Exception as error:
            error.add_note(f"rank {self.rank} in {self.place}")
            raise

    def close(self, complete: bool) -> None:
        """Stop watching. If the run is complete, tell the other ranks not to expect anything more of this one."""
        self._closed.set()
        for thread in self._threads:
            thread.join(LEAVE_S)
        if complete:
            self._store.set_timeout(timedelta(seconds=LEAVE_S))
            with suppress(RuntimeError):  # the process that holds the store may have left already
                self._speak(done=True)

    def _speak(self, done: bool = False) -> None:
        self._spoken += 1
        place, host = self.place, f"{socket.gethostname()}, pid {os.getpid()}"
        news: News = {
            "spoken": self._spoken,
            "turn": place.turn,
            "since": place.since,
            "place": str(place),
            "host": host,
            "done": done,
        }
        self._store.set(self._keys[self.rank], json.dumps(news))

    def _talk(self) -> None:
        while not self._closed.wait(self.interval_s):
            try:
                self._speak()
                texts = self._store.multi_get(self._keys)
            except RuntimeError:  # the store does not answer; `_judge` ends the job if that lasts
                continue
            self._answered = time.monotonic()
            for heard, text in zip(self._heard, texts, strict=True):
                if text != heard.text:
                    news = json.loads(text)
                    if heard.news is None or news["since"] != heard.news["since"]:
                        heard.since = self._answered
                    heard.at, heard.text, heard.news = self._answered, text, news

    def _judge(self) -> None:
        while not self._closed.wait(self.interval_s):
            verdict = self.verdict(time.monotonic())
            if verdict:
                self._end(verdict)
                return

    def verdict(self, now: float) -> list[str]:
        """The reasons why the job must end, a line each; empty while all is well."""
        if now - self._answered > self.silence_s:
            return [
                f"the job's store has not answered for {now - self._answered:.0f} s: the host of rank 0 "
                f"{self._heard[0]} is down, stopped or cut off from this one",
                self._own(now),
            ]
        silent = [
            f"rank {rank} has not been heard of for {now - heard.at:.0f} s {heard}"
            for rank, heard in enumerate(self._heard)
            if rank != self.rank and now - heard.at > self.silence_s and not heard.done
        ]
        if silent:
            return [*silent, self._own(now)]
        if not self.place.timed or now - self.place.since <= self.limit_s:
            return []
        behind = self._behind()
        if any(now - self._heard[rank].since <= self.limit_s for rank in behind):
            return []  # the ranks that this one waits for are moving
        named = [f"rank {rank} is behind the others {self._heard[rank]}" for rank in behind]
        if len(behind) == len(self._heard):  # all wait for each other, in a collective
            named = [f"all {len(behind)} ranks are in {self.place}"]
        return [f"no progress for {self.limit_s:g} s (train.watchdog_s)", *named, self._own(now)]

    def _own(self, now: float) -> str:
        return f"rank {self.rank} (this one) has been in {self.place} for {now - self.place.since:.0f} s"

    def _behind(self) -> list[int]:
        """The ranks that the others wait for; if all have taken the same turns, all of them."""
        turns = [heard.turn for heard in self._heard]
        return [rank for rank, turn in enumerate(turns) if turn == min(turns)]

    def _end_process(self, verdict: list[str]) -> NoReturn:
        lines = [f"watchdog: {line}" for line in verdict]
        # A backward pass on a GPU runs in a thread of autograd's, while the training thread waits for it.
        lines.append(f"watchdog: its threads, innermost call first; training is {self._watched_thread:#018x}:")
        print("\n".join(lines), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        os._exit(STALLED)


def watch_job(rank: int, world_size: int, limit_s: float) -> Watchdog:
    """Start the watchdog of this rank, in the job that torch.distributed has joined (collective)."""
    store = dist.distributed_c10d._get_default_store()
    return Watchdog(store, rank, world_size, limit_s).start()
