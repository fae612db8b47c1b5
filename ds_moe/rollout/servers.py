"""`Servers`: the servers of `rl.engine.urls` as one rollout engine."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from ds_moe.config.rollout import EngineConfig
from ds_moe.errors import UserError, all_in_one
from ds_moe.rollout.engine import Completion, EnginesGone, Prompt, Sampling
from ds_moe.rollout.http import Abandoned, Unanswered
from ds_moe.rollout.requests import SampleRequests
from ds_moe.rollout.server import LeftOut, PublishedWeights, Server
from ds_moe.rollout.server_api import ServerApi, Wanted
from ds_moe.rollout.sglang import SglangApi
from ds_moe.rollout.vllm import VllmApi

APIS: dict[str, Callable[[Wanted], ServerApi]] = {"vllm": VllmApi, "sglang": SglangApi}
KNOWN = 2  # greedy answers that are kept, to be compared with those of servers that come back
UNLIKE = 0.2  # nats that their log-probs may differ: rounding to bf16 costs up to .1, weights in a wrong place .3
FIRST_S, MOST_S = 0.5, 15.0  # between two looks for servers that do not answer: doubled from the first to the second


class Servers:
    """A `RolloutEngine` over HTTP."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        routing: bool,
        longest: int,
        note: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            routing: whether completions must come with the experts that were used.
            longest: tokens of a prompt and its completion together.
            note: is told of servers that are lost and found.

        Raises:
            UserError: `key_from` names no environment variable.
        """
        key = None
        if config.key_from is not None and not (key := os.environ.get(config.key_from)):
            raise UserError(
                f"rl.engine.key_from: the environment has no {config.key_from} (set it to the servers' key)"
            )
        api = APIS[config.kind](Wanted(routing, longest, config.model))
        self._config, self._api, self._note = config, api, note
        self._servers = [Server(url, api, key, config.timeout_s, note) for url in config.urls]
        self._weights: PublishedWeights | None = None
        self._known: list[tuple[Prompt, int, Completion]] = []  # greedy answers under these weights

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

        self._until(lambda: bool(found), look, self._servers)
        return [found.get(server.url) or f"{server.reason} (it is looked for later)" for server in self._servers]

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        deliver: Callable[[int, list[Completion]], None],
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        """See `RolloutEngine`. `SampleRequests` has the rules."""
        requests = SampleRequests(
            self._servers, self._api, self._config, lambda: self._weights, self._verify, self._note
        )
        requests.run(prompts, sampling, deliver, pulse)

    def publish(self, folder: Path, version: str) -> None:
        """See `RolloutEngine`; the servers load at the same time."""
        self._known = []  # first: who loads the new weights is not compared with answers of the old
        weights = self._weights = PublishedWeights(folder, version)
        known = [server for server in self._servers if server.state == "ready"]
        self._on_each(known, lambda server: server.hand_over(weights))
        others = [server for server in self._servers if server not in known]
        self._until(self._any_ready, lambda server: server.prepare(lambda: weights), others)

    def greedy(self, prompt: Prompt, max_new_tokens: int) -> list[Completion]:
        """See `RolloutEngine`."""
        answers: dict[str, Completion] = {}

        def ask(server: Server) -> None:
            answers[server.url] = self._most_likely(server, prompt, max_new_tokens)

        self._on_each([server for server in self._servers if server.state == "ready"], ask)
        if not answers:
            raise EnginesGone(self._gone(0))
        self._known = [*self._known, (prompt, max_new_tokens, next(iter(answers.values())))][-KNOWN:]
        return [answers[server.url] for server in self._servers if server.url in answers]

    def _most_likely(self, server: Server, prompt: Prompt, max_new_tokens: int) -> Completion:
        sampling = Sampling(completions=1, max_new_tokens=max_new_tokens, temperature=0.0, seed=0)
        [answer] = self._api.sample(server.http, prompt, sampling, 0, self._config.timeout_s)
        return answer

    def _verify(self, server: Server) -> str | None:
        """How the greedy answers of a server that came back differ from those that the run has seen and accepted.

        At a near tie two servers go on with different tokens: up to there their log-probs are those of the most likely
        token, which rounding changes little.
        """
        for prompt, count, known in self._known:
            found = self._most_likely(server, prompt, count)
            pairs = list(zip(found.token_ids, known.token_ids, strict=False))
            same = next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs) - 1) + 1
            off = fmean(abs(a - b) for a, b in zip(found.logprobs[:same], known.logprobs[:same], strict=True))
            if off > UNLIKE:
                return f"log-probs of {same} greedy tokens differ by {off:.3g} on average from those of before"
        return None

    def close(self) -> None:
        """See `RolloutEngine`. A server that could not load its weights stays paused."""
        threads = [threading.Thread(target=server.close, daemon=True) for server in self._servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _any_ready(self) -> bool:
        return any(server.state == "ready" for server in self._servers)

    def _until(self, enough: Callable[[], bool], what: Callable[[Server], None], servers: Sequence[Server]) -> None:
        """Do `what` with those of the servers that are gone; again, until it is enough or `wait_s` seconds are over."""
        began, pause = time.monotonic(), FIRST_S
        while True:
            self._on_each([server for server in servers if server.state == "gone"], what)
            if enough():
                return
            waited = time.monotonic() - began
            if waited >= self._config.wait_s:
                raise EnginesGone(self._gone(waited))
            if pause == FIRST_S:
                self._note(f"{self._gone(waited)}; waiting up to {self._config.wait_s:g} s")
            time.sleep(min(pause, self._config.wait_s - waited))
            pause = min(2 * pause, MOST_S)

    def _on_each(self, servers: Sequence[Server], what: Callable[[Server], None]) -> None:
        """Do it with all of them at a time. Those that do not answer are gone; whoever has wrong settings is an error.

        Raises:
            UserError: a line for each wrong setting; or no server is left that could load its weights.
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
                wrong.extend(str(error).splitlines())
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
            raise UserError(f"no server could load the weights: {self._servers[0].url}: {self._servers[0].reason}")

    def _gone(self, seconds: float) -> str:
        reasons = [server.reason for server in self._servers if server.reason]
        since = f" for {seconds:.0f} s" if seconds else ""
        return f"no server of rl.engine.urls answers{since}: {reasons[0] if reasons else 'none is ready'}"
