"""`Servers`: the servers of `rl.engine.urls` as one rollout engine."""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ds_moe.config.rollout import EngineConfig
from ds_moe.errors import UserError, all_in_one
from ds_moe.rollout.engine import Completion, EnginesGone, Problem, Prompt, Sampling
from ds_moe.rollout.http import Abandoned, Malformed, Unanswered
from ds_moe.rollout.requests import TRIES, SampleRequests
from ds_moe.rollout.server import LeftOut, PublishedWeights, Server
from ds_moe.rollout.server_api import ServerApi, Wanted
from ds_moe.rollout.sglang import SglangApi
from ds_moe.rollout.vllm import VllmApi

APIS: dict[str, Callable[[Wanted], ServerApi]] = {"vllm": VllmApi, "sglang": SglangApi}
FIRST_S, MOST_S = 0.5, 15.0  # between two looks for servers that do not answer: doubled from the first to the second


class Servers:
    """A `RolloutEngine` over HTTP."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        routing: bool,
        longest: int,
        dtype: str | None = None,
        note: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            routing: whether completions must come with the experts that were used.
            longest: tokens of a prompt and its completion together.
            dtype: of the weights that are handed over, see `Wanted`.
            note: is told of servers that are lost and found.

        Raises:
            UserError: `key_from` names no environment variable.
        """
        key = None
        if config.key_from is not None and not (key := os.environ.get(config.key_from)):
            raise UserError(
                f"rl.engine.key_from: the environment has no {config.key_from} (set it to the servers' key)"
            )
        api = APIS[config.kind](Wanted(routing, longest, config.model, dtype))
        self._config, self._api, self._note = config, api, note
        self._servers = [Server(url, api, key, config.timeout_s, note) for url in config.urls]
        self._weights: PublishedWeights | None = None
        self._answered = False  # whether a server has answered a prompt in this process
        self._closed = threading.Event()

    def check(self) -> list[str]:
        """See `RolloutEngine`; waits for the first server, and leaves those that do not answer yet for later. It
        changes nothing: another run may be about to hand weights to the same servers.

        Raises:
            EnginesGone: none has answered in `wait_s` seconds.
            UserError: a line for each wrong setting of each server.
        """
        found: dict[str, str] = {}

        def look(server: Server) -> None:
            found[server.url] = server.look()

        self._until(lambda: bool(found), look, strict=True)
        return [found.get(server.url) or f"{server.reason} (it is looked for later)" for server in self._servers]

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        deliver: Callable[[int, list[Completion]], None],
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        """See `RolloutEngine`. `SampleRequests` has the rules."""
        asked = SampleRequests(self._servers, self._api, self._config, self._current, self._note, self._answered)
        asked.run(prompts, sampling, deliver, pulse)
        self._answered = asked.answered

    def publish(self, folder: Path, version: str) -> None:
        """See `RolloutEngine`; the servers load at the same time."""
        weights = self._weights = PublishedWeights(folder, version)
        known = [server for server in self._servers if server.state == "ready"]
        self._on_each(known, lambda server: server.hand_over(weights))
        self._until(lambda: bool(self._ready()), lambda server: server.prepare(self._current))

    def prove(self, prompts: Sequence[Prompt], max_new_tokens: int, problem: Problem) -> None:
        """See `RolloutEngine`. A server that fails to answer is lost, and is judged when it is found again."""
        weights = self._weights
        assert weights is not None, "`publish` comes first"
        wrong: list[str] = []
        right: list[Server] = []
        cut: Counter[str] = Counter()  # answers of a server that could not be used

        def judged(server: Server) -> str | None:
            greedy = Sampling(completions=1, max_new_tokens=max_new_tokens, temperature=0.0, seed=0)
            found: list[Completion] = []
            for prompt in prompts:
                found += self._api.sample(server.http, prompt, greedy, 0, self._config.timeout_s)
            return problem(server.url, found)

        def ask(server: Server) -> None:
            if server.state == "gone":
                server.prepare(self._current)
            try:
                text = judged(server)
            except Malformed as error:
                cut[server.url] += 1
                if cut[server.url] == TRIES:
                    raise UserError(str(error)) from error
                raise
            if text is not None:
                wrong.append(text)
            else:
                server.proven = weights
                right.append(server)

        def proof(server: Server) -> None:
            if (text := judged(server)) is not None:
                raise UserError(text)

        self._on_each(self._ready(), ask)
        if not right and not wrong:
            self._until(lambda: bool(right or wrong), ask)
        if wrong:
            raise all_in_one(wrong)
        weights.proof, self._answered = proof, True

    def close(self) -> None:
        """See `RolloutEngine`. A server that could not load its weights stays paused."""
        self._closed.set()
        threads = [threading.Thread(target=server.close, daemon=True) for server in self._servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _current(self) -> PublishedWeights | None:
        return self._weights

    def _ready(self) -> list[Server]:
        """Those that have the weights of now: one may be found with older ones while others get them."""
        return [server for server in self._servers if server.state == "ready" and server.has(self._weights)]

    def _until(self, enough: Callable[[], bool], what: Callable[[Server], None], strict: bool = False) -> None:
        """Do `what` with the servers that are gone; again, until it is enough or `wait_s` seconds are over."""
        began, pause = time.monotonic(), FIRST_S
        while True:
            self._on_each([server for server in self._servers if server.state == "gone"], what, strict)
            if enough():
                return
            waited = time.monotonic() - began
            if waited >= self._config.wait_s:
                raise EnginesGone(self._gone(waited))
            if pause == FIRST_S:
                self._note(f"{self._gone(waited)}; waiting up to {self._config.wait_s:g} s")
            if self._closed.wait(min(pause, self._config.wait_s - waited)):
                raise UserError("rl.engine: closed while it waited for a server")
            pause = min(2 * pause, MOST_S)

    def _on_each(self, servers: Sequence[Server], what: Callable[[Server], None], strict: bool = False) -> None:
        """Do it with all of them at a time. Those that do not answer are gone; those that are wrong are left out.

        Raises:
            UserError: a line for each wrong setting, where it is `strict`; else if no server is left.
        """
        wrong: list[str] = []
        unexpected: list[BaseException] = []

        def one(server: Server) -> None:
            try:
                what(server)
            except Unanswered as error:
                server.lose(str(error))
            except LeftOut as error:
                self._note(f"{error}; it stays paused and is left out")
            except UserError as error:
                if strict:
                    wrong.extend(str(error).splitlines())
                    return
                server.leave_out(str(error).splitlines()[0])
                self._note(f"{server.reason}; it is left out")
            except Abandoned:
                pass
            except BaseException as error:  # a mistake of ours must not leave the caller waiting
                unexpected.append(error)

        threads = [threading.Thread(target=one, args=(server,), daemon=True) for server in servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if unexpected:
            raise unexpected[0]
        if wrong:
            raise all_in_one(wrong)
        if self._servers and all(server.state == "left out" for server in self._servers):
            raise UserError(f"no server is left: {self._servers[0].reason}")

    def _gone(self, seconds: float) -> str:
        reasons = [server.reason for server in self._servers if server.reason]
        since = f" for {seconds:.0f} s" if seconds else ""
        return f"no server of rl.engine.urls answers{since}: {reasons[0] if reasons else 'none is ready'}"
