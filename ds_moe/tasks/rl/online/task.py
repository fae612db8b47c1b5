"""`task: rl` with `rl.engine`: the loss of tasks/rl over rollouts that are sampled in turn with training."""

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from ds_moe.checkpoint.progress import Progress
from ds_moe.config.rules.engine import engine_of, steps_of_round
from ds_moe.config.run import RunConfig
from ds_moe.errors import UserError
from ds_moe.tasks.rl.online.reference import starting_policy
from ds_moe.tasks.rl.online.round_file import RoundFacts
from ds_moe.tasks.rl.online.rounds import Rounds
from ds_moe.tasks.rl.online.stream import OnlineStream
from ds_moe.tasks.rl.rewards import RewardSpread, reward_spread
from ds_moe.tasks.rl.rollouts import RolloutBatch
from ds_moe.tasks.rl.task import PolicyOptimization
from ds_moe.tasks.task import TrainingParts


class OnlinePolicyOptimization(PolicyOptimization):
    """The task of a run with `rl.engine`."""

    def __init__(self, parts: TrainingParts) -> None:
        super().__init__(parts)
        self._figures: dict[str, float] = {}  # of the round, reported with each of its steps
        if parts.stream is None:  # an evaluation of its own samples nothing
            return
        assert isinstance(parts.stream, OnlineStream)
        self._stream = parts.stream
        weighed = self.config.kl_weight > 0
        self._start = starting_policy(parts.config, parts.engine.module) if weighed else None
        self._rounds = Rounds(parts, parts.stream)

    def steps(self, progress: Progress) -> Iterator[list[RolloutBatch]]:
        """Round after round; the weights are handed over before each, and a batch of updates ends with its round."""
        trained_s = 0.0
        while progress.step < progress.total_steps:
            facts = self._rounds.begin(progress)
            self._figures = {
                **facts.figures,
                **self._rounds.seconds,
                "load_s": self._rounds.load_s,
                "train_s": trained_s,
            }
            self._say(facts, progress)
            began, steps = time.perf_counter(), iter(self._stream)
            while progress.step < progress.total_steps:
                left = min(self.config.updates_per_batch, progress.total_steps - progress.step)
                batch = list(islice(steps, left))
                if not batch:
                    break
                yield from self._updates(self._with_reference(batch))
            trained_s = time.perf_counter() - began

    def _with_reference(self, steps: list[list[RolloutBatch]]) -> list[list[RolloutBatch]]:
        """The micro-batches of some steps with their log-probs under the model that the run began with (collective).
        That takes the place of the run's once for all of them: both are copied between host and device each time."""
        if self._start is None:
            return steps
        with self._start.in_place():
            return [[replace(batch, reference_BS=self.scored(batch)[0]) for batch in step] for step in steps]

    def _say(self, facts: RoundFacts, progress: Progress) -> None:
        found, lag = self._figures, engine_of(self.parts.config).lag
        dropped = f", {found['dropped_completions']:.0f} dropped" if found["dropped_completions"] else ""
        older = f", lag {found['lag']:.2g}" if lag else ""
        spent = [f"sampled in {found['sample_s']:.1f} s", f"waited {found['wait_s']:.1f} s"]
        spent += [f"weights {found['weights_s']:.1f} + {found['load_s']:.1f} s"] if "weights_s" in found else []
        spent += [f"the round before trained in {found['train_s']:.1f} s"] if found["train_s"] else []
        self.parts.note(
            f"round {facts.number} from step {progress.step + 1}: reward {found['round_reward']:.3f}, {facts.records} "
            f"completions of {found['completion_tokens']:.1f} tokens{dropped}{older}; {', '.join(spent)}"
        )

    def metrics(self, progress: Progress) -> dict[str, float]:
        return {**super().metrics(progress), **self._figures}

    def note_mismatch(self, what: str) -> None:
        """The engine was given these very weights. With a lag it may have had older ones."""
        if engine_of(self.parts.config).lag == 0:
            raise UserError(f"{what}: does the engine sample at rl.temperature, from the whole softmax, this model?")
        self.parts.note(what)

    @property
    def _spread(self) -> RewardSpread:
        return reward_spread(self._stream.remembered)

    def close(self) -> None:
        if self.parts.stream is not None:
            self._rounds.close()


def online_summary(config: RunConfig) -> list[str]:
    """For the opening summary."""
    engine = engine_of(config)
    assert engine is not None
    where = "plain transformers on the host of rank 0" if engine.kind == "local" else ", ".join(engine.urls)
    size = f"{engine.prompts} prompts x {engine.completions} completions, {steps_of_round(config, engine)} steps"
    lag = f"; sampling is up to {engine.lag} ahead" if engine.lag else ""
    return [f"rounds    {size} each{lag}", f"rollouts  {engine.kind}: {where}"]
