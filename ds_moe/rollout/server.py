"""One server as a run sees it: whether it may be asked, what it has loaded, and how weights are handed to it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ds_moe.errors import UserError, one_line
from ds_moe.rollout.http import CONNECT_S, Abandoned, Http, Refused, Unanswered
from ds_moe.rollout.server_api import ServerApi

IDLE_S = 2.0  # after which a server is asked for its version before it gets work: it may have been restarted
AGAIN_S = 1.0  # before a failed load is tried once more


@dataclass(eq=False)
class PublishedWeights:
    """What every server must have loaded before it samples.

    Attributes:
        folder: as the servers see it.
        proof: raises `UserError` for a server that does not answer as these weights do; None: not known yet.
    """

    folder: Path
    version: str
    proof: "Callable[[Server], None] | None" = None


class LeftOut(Exception):
    """A server that must not be asked again in this run. Its text says why."""


class Server:
    """Its methods may be called from several threads.

    Attributes:
        state: "gone" until `prepare` has found it in order; "left out" for good.
        reason: why it is gone or left out.
        proven: the weights as which it was found to answer.
    """

    def __init__(
        self, url: str, api: ServerApi, key: str | None, timeout_s: float, note: Callable[[str], None]
    ) -> None:
        self.url = url
        self.http = Http(url, key)
        self.state: Literal["ready", "gone", "left out"] = "gone"
        self.reason = ""
        self.version = ""  # of what it has loaded, as far as is known
        self.in_flight = 0
        self._api, self._timeout_s, self._note = api, timeout_s, note
        self._work = threading.Condition()  # guards `in_flight`, `_shut` and `_asked_at`
        self._shut = False  # no request begins: weights are about to change
        self._asked_at = -IDLE_S
        self._changing = threading.Lock()  # of weights
        self._paused = False
        self._loaded: PublishedWeights | None = None  # by this process: names of versions may come again in another
        self.proven: PublishedWeights | None = None
        self._ended = False

    # --- requests

    def enter(self, most: int) -> bool:
        """Begin a request, unless `most` are under way, the server is not ready or its weights are changing."""
        with self._work:
            if self.state != "ready" or self._shut or self.in_flight >= most:
                return False
            self.in_flight += 1
            return True

    def leave(self) -> None:
        with self._work:
            self.in_flight -= 1
            self._asked_at = time.monotonic()
            self._work.notify_all()

    def has(self, weights: PublishedWeights | None) -> bool:
        """Whether it has what is to be sampled from: others may have been published while it was looked for."""
        if weights is None or self._shut:
            return True
        return self.version == weights.version and (weights.proof is None or self.proven is weights)

    def idle(self) -> bool:
        """Whether nothing has been asked for so long that the server may have been restarted unnoticed."""
        with self._work:
            return self.in_flight == 0 and time.monotonic() - self._asked_at > IDLE_S

    def lose(self, reason: str) -> None:
        if self.state != "left out":
            self.state, self.reason = "gone", reason

    def leave_out(self, reason: str) -> None:
        self.state, self.reason = "left out", reason

    @contextmanager
    def _drained(self) -> Iterator[None]:
        """Let no request begin, and wait for those under way: each of them ends at its time-out at the latest."""
        with self._work:
            self._shut = True
            self._work.wait_for(lambda: self.in_flight == 0)
        try:
            yield
        finally:
            with self._work:
                self._shut = False

    # --- weights

    def look(self) -> str:
        """What it is, on one line; changes nothing. Raises `Unanswered`, and `UserError` for wrong settings."""
        return self._api.check(self.http)

    def prepare(self, current: Callable[[], PublishedWeights | None]) -> None:
        """Find out whether the server is in order, hand it the weights if it has others, and make it ready.

        Args:
            current: the weights of now, which may be others than when the server was lost.

        Raises:
            Unanswered: it is not there, or not yet.
            UserError: its settings are wrong, or it answers otherwise than the weights do.
            LeftOut: it cannot load the weights.
        """
        with self._changing:
            self._api.check(self.http)
            self.version = self._api.version(self.http)
            weights = current()
            if weights is not None and (self._loaded is not weights or self.version != weights.version):
                with self._drained():
                    self._load(weights)
            else:  # a trainer that died may have left it paused
                self._api.resume(self.http)
                self._paused = False
            if weights is not None and weights.proof is not None and self.proven is not weights:
                weights.proof(self)
                self.proven = weights
            self._ready()

    def hand_over(self, weights: PublishedWeights) -> None:
        """Load weights once nothing is in flight. Raises as `prepare`."""
        with self._changing, self._drained():
            self._load(weights)
            self._ready()

    def _ready(self) -> None:
        with self._work:
            self._asked_at = time.monotonic()
            self.state, self.reason = "ready", ""

    def _load(self, weights: PublishedWeights) -> None:
        """Pause, load, name the version, resume. Where the load fails twice the server stays paused for good."""
        if self._ended:
            raise Abandoned
        self._paused, self.proven = True, None
        self._api.pause(self.http, self._timeout_s)
        try:
            self._api.load(self.http, weights.folder, weights.version, self._timeout_s)
        except (UserError, Unanswered) as error:
            if isinstance(error, Unanswered) and not error.reached:
                raise
            time.sleep(AGAIN_S)
            try:
                self._api.load(self.http, weights.folder, weights.version, self._timeout_s)
            except (UserError, Unanswered) as again:
                if isinstance(again, Unanswered) and not again.reached:
                    raise
                fix = "is it a folder that the server sees, in hub layout?"
                text = f"{self.url} cannot load {weights.folder}: {one_line(again, 400)} ({fix})"
                self.leave_out(text)
                raise LeftOut(text) from again
        self.version, self._loaded = weights.version, weights
        self._api.resume(self.http)
        self._paused = False

    def abandon(self) -> None:
        """End what is under way."""
        self.http.close()
        if not self._ended:
            self.http.open_again()

    def close(self) -> None:
        """End what is under way for good; a server that is paused, and not because it could not load, is resumed."""
        self._ended = True
        self.http.close()
        done = self._changing.acquire(timeout=CONNECT_S)  # a thread that loads weights has noticed, and pauses no more
        try:
            if self._paused and self.state != "left out":
                self._resume_at_last()
        finally:
            if done:
                self._changing.release()

    def _resume_at_last(self) -> None:
        self.http.open_again()
        try:
            self._api.resume(self.http)
            self._paused = False
        except (Unanswered, Refused, Abandoned) as error:
            self._note(f"{self.url} may be paused: {one_line(error, 200)}")
        finally:
            self.http.close()
