"""Which server is asked for which prompt, and what becomes of a request that fails.

Every request has a thread; everything is decided in the thread that called `run`, which takes their results one by one.
"""

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ds_moe.config.rollout import EngineConfig
from ds_moe.errors import UserError, one_line
from ds_moe.rollout.engine import Completion, EnginesGone, Prompt, Sampling
from ds_moe.rollout.http import Abandoned, Malformed, Refused, Unanswered
from ds_moe.rollout.server import LeftOut, PublishedWeights, Server
from ds_moe.rollout.server_api import OtherPrompt, ServerApi

TRIES = 6  # of a prompt, until it is given up
FIRST_S, MOST_S = 0.25, 15.0  # between two tries of a prompt, or two looks for a server: doubled up to the second
TICK_S = 0.25  # of waiting for results, after which it is seen what else has become due
PULSE_S = 1.0
OF_PROMPT = (400, 413, 422)  # statuses by which a server says that a prompt is wrong
WRONG = (
    8  # prompts that no server can answer as they are; where they are more, and half of all, the fault is not theirs
)


@dataclass
class OpenPrompt:
    """A prompt that has no completions yet."""

    number: int
    tries: int = 0
    due: float = 0.0  # time.monotonic from which it may be asked for
    failed_on: set[str] = field(default_factory=set)  # urls, which are asked last
    reason: str = ""  # of the last failure


@dataclass
class Look:
    """When a server that is gone is looked for again."""

    due: float = 0.0
    pause: float = FIRST_S
    under_way: bool = False
    noted: bool = False


def seed_of(sampling: Sampling, number: int) -> int:
    """The seed of a prompt, far from those of the others: engines add the number of the completion to it."""
    digest = hashlib.sha256(f"{sampling.seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:4]) // 2


def waits(pause: float) -> float:
    return min(2 * pause, MOST_S)


class SampleRequests:
    """One call of `sample`."""

    def __init__(
        self,
        servers: Sequence[Server],
        api: ServerApi,
        config: EngineConfig,
        weights: Callable[[], PublishedWeights | None],
        note: Callable[[str], None],
        answered: bool = False,
    ) -> None:
        """
        Args:
            answered: whether a server has answered anything before, so that it is not the settings that are wrong.
        """
        self._servers, self._api, self._config = servers, api, config
        self._weights, self._note = weights, note
        self._results: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._looks = {server.url: Look() for server in servers}
        self._none_since: float | None = None  # time.monotonic since which no server is ready
        self.answered = answered
        self._wrong = 0  # prompts that were given up for a reason that does not pass

    def run(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        deliver: Callable[[int, list[Completion]], None],
        pulse: Callable[[], None],
    ) -> None:
        """See `RolloutEngine.sample`."""
        self._prompts, self._sampling, self._deliver = prompts, sampling, deliver
        self._waiting = [OpenPrompt(number) for number in range(len(prompts))]
        self._open = len(prompts)
        pulsed = time.monotonic()
        try:
            while self._open:
                self._look_for_servers()
                self._assign()
                try:
                    self._results.get(timeout=TICK_S)()
                except queue.Empty:
                    pass
                if time.monotonic() - pulsed > PULSE_S:
                    pulse()
                    pulsed = time.monotonic()
        finally:
            self._end()

    def _end(self) -> None:
        """Close what is under way: servers notice, and stop computing it."""
        for server in self._servers:
            if server.in_flight and self._open:
                server.abandon()

    # --- prompts

    def _assign(self) -> None:
        """Give waiting prompts to servers that have room, those with the fewest requests first."""
        now, later = time.monotonic(), []
        for job in self._waiting:
            server = self._server_for(job) if job.due <= now else None
            if server is None:
                later.append(job)
            else:
                threading.Thread(target=self._ask, args=(server, job), daemon=True).start()
        self._waiting = later

    def _server_for(self, job: OpenPrompt) -> Server | None:
        for server in sorted(self._servers, key=lambda one: (one.url in job.failed_on, one.in_flight)):
            if server.enter(self._config.in_flight):
                return server
        return None

    def _ask(self, server: Server, job: OpenPrompt) -> None:
        """In a thread: one request."""
        prompt, sampling, version = self._prompts[job.number], self._sampling, server.version
        try:
            made = self._api.sample(
                server.http, prompt, sampling, seed_of(sampling, job.number), self._config.timeout_s
            )
        except BaseException as error:
            self._results.put(lambda error=error: self._failed(server, job, error))
        else:
            self._results.put(lambda: self._done(job, made, version))
        finally:
            server.leave()

    def _done(self, job: OpenPrompt, made: list[Completion], version: str) -> None:
        self.answered = True
        self._open -= 1
        forbidden = set(self._sampling.forbidden)
        kept = [
            Completion(one.token_ids, one.logprobs, one.routing, one.routing_format, one.finish_reason, version)
            for one in made
            if not forbidden.intersection(one.token_ids)
        ]
        self._deliver(job.number, kept)

    def _failed(self, server: Server, job: OpenPrompt, error: BaseException) -> None:
        if isinstance(error, Abandoned):
            raise UserError(f"{server.url}: the engine was closed while it sampled") from error
        passes = isinstance(error, Unanswered)
        if not passes and not _of_prompt(error):
            raise error
        if passes and server.state == "ready" and not isinstance(error, Malformed):
            self._lose(server, str(error))
        job.tries += 1
        job.reason = str(error)
        job.failed_on.add(server.url)
        if passes and job.tries < TRIES:
            job.due = time.monotonic() + min(FIRST_S * 2 ** (job.tries - 1), MOST_S)
            self._waiting.append(job)
        else:
            self._give_up(job, error)

    def _give_up(self, job: OpenPrompt, error: BaseException) -> None:
        """Do without a prompt, unless it is not the prompt that is wrong."""
        self._open -= 1
        self._wrong += isinstance(error, Malformed | UserError)
        nothing = not self._open and not self.answered
        if nothing or self._wrong > max(WRONG, len(self._prompts) // 2):
            raise UserError(job.reason) from error
        where = self._prompts[job.number].where or f"prompt {job.number}"
        self._note(f"{where} is given up after {job.tries} tries: {job.reason}")
        self._deliver(job.number, [])

    # --- servers

    def _lose(self, server: Server, reason: str) -> None:
        server.lose(reason)
        self._looks[server.url] = Look()

    def _look_for_servers(self) -> None:
        """See which servers may be asked, and look for those that are gone."""
        now, weights = time.monotonic(), self._weights()
        for server in self._servers:
            unsure = not server.has(weights) or (self._waiting and server.idle())  # it may have been restarted
            if server.state == "ready" and unsure:
                self._lose(server, f"{server.url}: not asked for a while")
            look = self._looks[server.url]
            if server.state == "gone" and not look.under_way and look.due <= now:
                look.under_way = True
                threading.Thread(target=self._look, args=(server,), daemon=True).start()
        self._wait_or_end(now)

    def _wait_or_end(self, now: float) -> None:
        """Raise `EnginesGone` where no server has been ready for `wait_s` seconds."""
        if any(server.state == "ready" for server in self._servers):
            self._none_since = None
            return
        if self._none_since is None:
            self._none_since = now
        gone = [server for server in self._servers if server.state == "gone"]
        if not gone:
            raise UserError(f"no server is left: {self._servers[0].reason}")
        if now - self._none_since > self._config.wait_s and all(self._looks[one.url].noted for one in gone):
            waited = f"for {now - self._none_since:.0f} s (rl.engine.wait_s)"
            raise EnginesGone(f"no server of rl.engine.urls answers {waited}: {gone[0].reason}")

    def _look(self, server: Server) -> None:
        """In a thread: whether a server is there and in order, and has the weights."""
        try:
            server.prepare(self._weights)
        except BaseException as error:
            self._results.put(lambda error=error: self._not_found(server, error))
        else:
            self._results.put(lambda: self._found(server))

    def _found(self, server: Server) -> None:
        if self._looks[server.url].noted:
            self._note(f"{server.url} is back, with weights {server.version!r}")
        self._looks[server.url] = Look()

    def _not_found(self, server: Server, error: BaseException) -> None:
        look = self._looks[server.url]
        if isinstance(error, LeftOut):
            self._note(f"{error}; it stays paused and is left out")
        elif isinstance(error, UserError):  # it was restarted with other settings, or loads wrong
            server.leave_out(str(error).splitlines()[0])
            self._note(f"{server.reason}; it is left out")
        elif not isinstance(error, Unanswered):
            raise error
        else:
            server.lose(str(error))
            if not look.noted:
                others = sum(one.state == "ready" for one in self._servers)
                self._note(f"{one_line(error)}; {others} other servers go on, and it is looked for")
            self._looks[server.url] = Look(time.monotonic() + look.pause, waits(look.pause), noted=True)


def _of_prompt(error: BaseException) -> bool:
    """Whether a request failed because of its prompt, which another try or server will not change."""
    return isinstance(error, OtherPrompt) or (isinstance(error, Refused) and error.status in OF_PROMPT)
