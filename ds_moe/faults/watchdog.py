"""The job's watchdog: a rank that dies, hangs or stands still ends the job on every host, by name.

The training thread says at every turn where it is (`at("backward", step=12)`). One thread of the watchdog carries that
to the job's store and brings back where the others are; another one judges, since the first may itself wait for a host
that is gone. Both run while the training thread waits in a collective.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from typing import Any, NoReturn

import torch.distributed as dist

STALLED = 3  # exit status of a rank whose watchdog has ended it
SILENCE = 0.75  # of the limit: a rank that lives says something many times in it, whatever it computes
CHECKS = 20  # a limit
LEAVE_S = 2.0  # that a rank which leaves waits for the store
_runs = count()  # of this process: each run of a job has its own keys in the store


@dataclass(frozen=True)
class Place:
    """Where a rank's training thread is.

    Attributes:
        turn: counts up; the ranks of a job take the same turns, so that the one with the lowest is behind.
        since: when it was last seen to move, of `time.monotonic`.
        timed: whether it may not stay there for longer than the limit.
    """

    turn: int
    step: int
    phase: str
    since: float
    timed: bool

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step else self.phase


@dataclass
class Heard:
    """What was last heard of a rank, when, and since when that has been the same place (`time.monotonic` here)."""

    at: float
    since: float
    text: bytes = b""
    news: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"({self.news['host']}), last in {self.news['place']}" if self.news else "(never heard of)"


class Watchdog:
    """Watches this rank and, through the job's store, all others.

    Args:
        store: of the job; a clone of it is used, so that nobody waits for anybody.
        limit_s: seconds that a rank may take for one turn, and (`SILENCE` of it) give no sign of life.
        end: called with the verdict's lines; must not return. The default ends this process with `STALLED`, upon which
            the launcher ends the others of this host.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        limit_s: float,
        end: Callable[[list[str]], Any] | None = None,
    ) -> None:
        self.limit_s, self.silence_s, self.interval_s = limit_s, SILENCE * limit_s, limit_s / CHECKS
        self.rank, self._end = rank, end or self._end_process
        self.place = Place(0, 0, "start", time.monotonic(), timed=False)
        self._store = store.clone()
        self._store.set_timeout(timedelta(seconds=self.silence_s))
        run = next(_runs)
        self._keys = [f"watchdog/{run}/{other}" for other in range(world_size)]
        self._heard = [Heard(time.monotonic(), time.monotonic()) for _ in self._keys]
        self._answered = time.monotonic()  # when the store last did
        self._spoken = 0
        self._closed = threading.Event()
        self._watched_thread = threading.get_ident()
        self._threads: list[threading.Thread] = []

    def start(self) -> Watchdog:
        """Begin to watch (collective: every rank has spoken before any listens)."""
        self._speak()
        dist.barrier()
        for work in (self._talk, self._judge):
            thread = threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def at(self, phase: str, step: int | None = None, timed: bool = True) -> None:
        """The training thread takes its next turn; `step` None: the same as before."""
        step = self.place.step if step is None else step
        self.place = Place(self.place.turn + 1, step, phase, time.monotonic(), timed)

    def pulse(self) -> None:
        """The training thread moves on within its turn, which other ranks may have ended."""
        self.place = replace(self.place, since=time.monotonic())

    def close(self, complete: bool) -> None:
        """Stop watching; of a run that is complete the others are told that no more will be heard of this rank."""
        self._closed.set()
        for thread in self._threads:
            thread.join(LEAVE_S)
        if complete:
            self._store.set_timeout(timedelta(seconds=LEAVE_S))
            with suppress(RuntimeError):  # the store's host has left already
                self._speak(done=True)

    def _speak(self, done: bool = False) -> None:
        self._spoken += 1
        place, host = self.place, f"{socket.gethostname()}, pid {os.getpid()}"
        news = {"spoken": self._spoken, "turn": place.turn, "since": place.since, "place": str(place), "host": host}
        self._store.set(self._keys[self.rank], json.dumps(news | {"done": done}))

    def _talk(self) -> None:
        while not self._closed.wait(self.interval_s):
            try:
                self._speak()
                texts = self._store.multi_get(self._keys)
            except RuntimeError:  # not reached: `_judge` says for how long
                continue
            self._answered = time.monotonic()
            for heard, text in zip(self._heard, texts, strict=True):
                if text != heard.text:
                    news = json.loads(text)
                    if not heard.news or news["since"] != heard.news["since"]:
                        heard.since = self._answered
                    heard.at, heard.text, heard.news = self._answered, text, news

    def _judge(self) -> None:
        while not self._closed.wait(self.interval_s):
            verdict = self.verdict(time.monotonic())
            if verdict:
                self._end(verdict)
                return

    def verdict(self, now: float) -> list[str]:
        """Why the job must end, a line each; empty while all is well."""
        if now - self._answered > self.silence_s:
            return [
                f"the job's store has not answered for {now - self._answered:.0f} s: the host of rank 0 "
                f"{self._heard[0]} is down, stopped or cut off from this one",
                self._own(now),
            ]
        silent = [
            f"rank {rank} has not been heard of for {now - heard.at:.0f} s {heard}"
            for rank, heard in enumerate(self._heard)
            if rank != self.rank and now - heard.at > self.silence_s and not heard.news.get("done")
        ]
        if silent:
            return [*silent, self._own(now)]
        if not self.place.timed or now - self.place.since <= self.limit_s:
            return []
        behind = self._behind()
        if any(now - self._heard[rank].since <= self.limit_s for rank in behind):
            return []  # it waits for one that moves
        named = [f"rank {rank} is behind the others {self._heard[rank]}" for rank in behind]
        if len(behind) == len(self._heard):  # a collective that nobody ends
            named = [f"all {len(behind)} ranks are in {self.place}"]
        return [f"no progress for {self.limit_s:g} s (train.watchdog_s)", *named, self._own(now)]

    def _own(self, now: float) -> str:
        return f"rank {self.rank} (this one) has been in {self.place} for {now - self.place.since:.0f} s"

    def _behind(self) -> list[int]:
        """The ranks that the others wait for: all, where all have taken the same turns."""
        turns = [heard.news.get("turn", 0) for heard in self._heard]
        return [rank for rank, turn in enumerate(turns) if turn == min(turns)]

    def _end_process(self, verdict: list[str]) -> NoReturn:
        stack = traceback.format_stack(sys._current_frames()[self._watched_thread])
        lines = [f"watchdog: {line}" for line in verdict]
        print("\n".join([*lines, "watchdog: its training thread, innermost call last:", *stack]), file=sys.stderr)
        sys.stderr.flush()
        os._exit(STALLED)


def watch_job(rank: int, world_size: int, limit_s: float) -> Watchdog:
    """The watchdog of a rank of the job that torch.distributed has joined (collective)."""
    store = dist.distributed_c10d._get_default_store()
    return Watchdog(store, rank, world_size, limit_s).start()
