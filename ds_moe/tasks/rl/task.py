"""`task: rl`: reinforce the completions of a rollout file under the routing that the inference engine used.

Ratios refer to the *old* policy, this trainer's own before the first of `rl.updates_per_batch` optimizer steps, and not
to the engine, whose log-probs only measure (and, with `rl.correction`, correct for) the mismatch.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe.checkpoint.progress import Progress
from ds_moe.data.batch import NO_LOSS
from ds_moe.models.head import at_labels, targets_of
from ds_moe.replay.metrics import means, metrics
from ds_moe.replay.objective import OBJECTIVES, Objective, PolicyInputs, policy_loss
from ds_moe.tasks.rl.rewards import RewardSpread, reward_spread
from ds_moe.tasks.rl.rollouts import RolloutBatch
from ds_moe.tasks.rl.router_watch import RouterWatch
from ds_moe.tasks.task import Task, TrainingParts

SUSPICIOUS = 0.2  # share of tokens: engines of one model differ in a few, other models in most
NOT_OF_THE_OBJECTIVE = {"engine", "reward", "objective", "normalize_std", "updates_per_batch", "temperature"}


class PolicyOptimization(Task):
    """The task of a run with `task: rl`; a dense model has no routing to replay."""

    def __init__(self, parts: TrainingParts) -> None:
        super().__init__(parts)
        moe = parts.config.moe
        self.config = parts.config.rl
        formula = self.config.model_dump(exclude=NOT_OF_THE_OBJECTIVE)
        self.objective = Objective(kind=self.config.objective, **formula)
        replays = moe is not None and moe.replay.enabled
        self.router = RouterWatch(parts.layers, self.config.router) if replays else None
        self._sums: dict[str, Tensor] = {}
        self._waiting = 0  # optimizer steps of the batch that are still to come
        self._steps = self._without_advantage = 0  # of this process

    @property
    def at_boundary(self) -> bool:
        """The old policy is not saved: a checkpoint waits for the last step that refers to it."""
        return self._waiting == 0

    def steps(self, progress: Progress) -> Iterator[list[RolloutBatch]]:
        """Takes `updates_per_batch` steps at a time and scores them under the policy of that moment."""
        stream = iter(self.parts.stream)
        while progress.step < progress.total_steps:
            left = progress.total_steps - progress.step
            yield from self._updates(list(islice(stream, min(self.config.updates_per_batch, left))))

    def _updates(self, batch: list[list[RolloutBatch]]) -> Iterator[list[RolloutBatch]]:
        """The steps of a batch, whose ratios refer to the policy of this moment."""
        began = time.perf_counter()
        if len(batch) > 1:
            batch = [[self._with_old(one) for one in step] for step in batch]
        self.scoring_s = time.perf_counter() - began
        for number, step in enumerate(batch, start=1):
            self._waiting = len(batch) - number
            yield step
            self.scoring_s = 0.0

    def weight(self, batch: RolloutBatch) -> Tensor:
        mask_BS = batch.completion_BS
        how = self.objective.aggregate or OBJECTIVES[self.objective.kind].aggregate
        return mask_BS.sum() if how == "token_mean" else mask_BS.any(1).sum()

    def loss(self, batch: RolloutBatch, share: float) -> Tensor:
        logprob_BS, expert_BSLK, routed_BS = self._score(batch)
        mask_BS, old_BS, old_expert_BSLK = batch.completion_BS, batch.old_BS, batch.old_expert_BSLK
        if old_BS is None:
            old_BS = logprob_BS.detach()
        if old_expert_BSLK is None and expert_BSLK is not None:
            old_expert_BSLK = expert_BSLK.detach()
        if self.router is not None:
            self._add(self.router.differences(_predicting(batch)))
        inputs = PolicyInputs(
            logprob_BS=logprob_BS,
            old_BS=old_BS,
            engine_BS=batch.engine_BS,
            mask_BS=mask_BS,
            advantage=batch.advantage_B,
            expert_BSLK=expert_BSLK,
            old_expert_BSLK=old_expert_BSLK,
            routed_BS=routed_BS,
            reference_BS=batch.reference_BS,
        )
        loss, stats = policy_loss(self.objective, inputs, normalizer=share)
        self._add(metrics(inputs, stats))
        self._add(_of_completions(batch, mask_BS.any(1)))
        return loss

    def metrics(self, progress: Progress) -> dict[str, float]:
        sums, self._sums = self._sums, {}
        totals = torch.stack(list(sums.values()))
        dist.all_reduce(totals)
        values = dict(zip(sums, totals, strict=True))
        self._note_advantages(progress.step, values)
        found = means(values)
        share = found.get("mismatch_large", 0.0)
        if share > SUSPICIOUS and progress.step == progress.file_from + 1:  # later the policy has moved on
            self.note_mismatch(
                f"step {progress.step}: {share:.0%} of the completion tokens are half or twice as likely as the "
                "rollouts say"
            )
        return found

    def note_mismatch(self, what: str) -> None:
        """Told where the rollouts seem to be another model's."""
        self.parts.note(f"{what}: was data.train sampled from this model at rl.temperature?")

    @cached_property
    def _spread(self) -> RewardSpread:
        return reward_spread(self.parts.stream.remembered)

    def _note_advantages(self, step: int, sums: Mapping[str, Tensor]) -> None:
        """Count a step whose advantages are all 0, and say so the first time."""
        self._steps += 1
        if sums["zero_advantage"] < sums["completions"]:
            return
        self._without_advantage += 1
        if self._without_advantage == 1:
            spread, completions = self._spread, int(sums["completions"])
            what = f"the advantages of all {completions} completions are 0, so it learns nothing from rewards"
            self.parts.note(f"step {step}: {what} ({spread.silent}); {spread.fix}")

    def closing_rows(self) -> dict[str, str]:
        if not self._without_advantage:
            return {}
        steps = f"{self._without_advantage} of {self._steps} ({self._spread.silent})"
        return {"steps with advantages of 0 only": steps}

    def _score(self, batch: RolloutBatch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs of the completions' tokens (B, S) and of the replayed experts that predict them (B, S, L, K), and
        which of them have a routing (B, S)."""
        mask_BS, expert_BSLK, routed_BS = batch.completion_BS, None, None
        if self.router is not None:
            self.router.begin(batch.inputs["routing"])
        how = {"temperature": self.config.temperature, "fp32_logits": True}
        found = at_labels(self.parts.engine, batch.inputs, batch.labels, **how)
        if self.router is not None:
            self.router.end()
            predicts_T = _predicting(batch)
            replayed_TLK = batch.inputs["routing"].flatten(0, 1)
            routed_BS = _in_samples((replayed_TLK >= 0).flatten(1).all(-1)[predicts_T], mask_BS)
            if self.objective.router != "none":
                expert_BSLK = _in_samples(self.router.logprobs()[predicts_T], mask_BS)
        return _in_samples(found.logits, mask_BS), expert_BSLK, routed_BS

    def _with_old(self, batch: RolloutBatch) -> RolloutBatch:
        """The micro-batch with its log-probs under the policy as it stands (collective)."""
        old_BS, old_expert_BSLK = self.scored(batch)
        return replace(batch, old_BS=old_BS, old_expert_BSLK=old_expert_BSLK)

    @torch.no_grad()
    def scored(self, batch: RolloutBatch) -> tuple[Tensor, Tensor | None]:
        """Log-probs of a micro-batch under the weights of this moment, see `_score`, on the CPU (collective)."""
        self.parts.engine.eval()  # nothing is counted, no loss of a balancer is made
        logprob_BS, expert_BSLK, _ = self._score(batch.to(self.parts.topology.device))
        self.parts.engine.train()
        return logprob_BS.cpu(), None if expert_BSLK is None else expert_BSLK.cpu()

    def _add(self, sums: dict[str, Tensor]) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value


def _predicting(batch: RolloutBatch) -> Tensor:
    """(T,) bool: the tokens whose next one belongs to a completion."""
    return (targets_of(batch.labels) != NO_LOSS).flatten()


def _in_samples(values: Tensor, mask_BS: Tensor) -> Tensor:
    """Values (N, ...) of the completions' tokens, sample after sample, where the mask has them; zeros elsewhere.

    Padded rows and a packed one hold the tokens in the same order.
    """
    return values.new_zeros(*mask_BS.shape, *values.shape[1:]).index_put((mask_BS,), values)


def _of_completions(batch: RolloutBatch, real_B: Tensor) -> dict[str, Tensor]:
    """Sums over the sequences that have a completion, and over those whose reward is known."""
    reward_B = batch.reward_B
    known_B = real_B & ~reward_B.isnan()
    return {
        "completions": real_B.sum().double(),
        "zero_advantage": (real_B & (batch.advantage_B == 0)).sum().double(),
        "rewards": known_B.sum().double(),
        "reward": torch.where(known_B, reward_B, 0).sum().double(),
    }
