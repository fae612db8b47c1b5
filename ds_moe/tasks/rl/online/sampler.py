"""The thread of rank 0 that alone uses the engine: rounds and weights are handed to it in the order of their need."""

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ds_moe.rollout.engine import Prompt, RolloutEngine
from ds_moe.rollout.reward import RewardPool
from ds_moe.tasks.rl.online.probe import OwnAnswer, WeightsCheck
from ds_moe.tasks.rl.online.round import RoundMaker, RunEnded
from ds_moe.tasks.rl.online.round_file import RoundFacts

KEPT = 2  # versions of weights
T = TypeVar("T")


class Sampler:
    """Does what it is told, one after the other. What fails makes all that follows fail in the same way: no round is
    sampled by weights that were found to be wrong."""

    def __init__(
        self,
        engine: RolloutEngine,
        rewards: RewardPool,
        maker: Callable[[Callable[[], bool]], RoundMaker],
        check: WeightsCheck,
    ) -> None:
        self._engine, self._rewards, self._check = engine, rewards, check
        self._closed = False
        self._moved = time.monotonic()  # when the thread last began something, or was seen at work
        self._maker = maker(self._stopping)
        self._thread = ThreadPoolExecutor(1, "rollouts")
        self._rounds: dict[int, Future[RoundFacts]] = {}
        self._end = 0  # position behind the prompts of the round that was made last
        self._failure: BaseException | None = None
        self.load_s = 0.0  # that the engine took for the weights it was given last, comparison included

    def hand_over(
        self, folder: Path, version: str, step: int, trained: int, prompts: Sequence[Prompt], own: Sequence[OwnAnswer]
    ) -> "Future[None]":
        """Give the engine the weights of `folder`, and compare what it makes of them with the trainer's own answers.

        Args:
            step: optimizer steps that they have taken, in `trained` whole rounds.
        """

        def work() -> None:
            began = time.perf_counter()
            self._engine.publish(folder, version)
            self._check.compare(self._engine, version, prompts, own)
            self._maker.trained[version], self._maker.version, self._maker.step = trained, version, step
            self.load_s = time.perf_counter() - began
            _remove_older(folder)

        return self._submit(work)

    def want(self, number: int, begin: int | None = None) -> "Future[RoundFacts]":
        """A round, which follows the one that was wanted last unless the position of its first prompt is given."""

        def work() -> RoundFacts:
            facts = self._maker.round(number, self._end if begin is None else begin)
            self._end = facts.end
            return facts

        if number not in self._rounds:
            self._rounds[number] = self._submit(work)
        return self._rounds[number]

    @property
    def quiet_s(self) -> float:
        """Seconds since the thread last gave a sign of life."""
        return time.monotonic() - self._moved

    def _stopping(self) -> bool:
        """Whether the run has ended; asked by the thread about once a second while it samples and scores."""
        self._moved = time.monotonic()
        return self._closed

    def _submit(self, work: Callable[[], T]) -> "Future[T]":
        def guarded() -> T:
            if self._stopping():
                raise RunEnded
            if self._failure is not None:
                raise self._failure
            try:
                return work()
            except BaseException as error:
                self._failure = error
                raise

        return self._thread.submit(guarded)

    def close(self) -> None:
        """End what was started; a round that is being sampled is abandoned."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._engine.close()
        self._rewards.close()


def _remove_older(folder: Path) -> None:
    """Of the versions up to the one that the engine has now, leave the newest `KEPT`."""
    versions = sorted(path for path in folder.parent.glob("step_*") if path.name <= folder.name)
    for old in versions[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
