"""`task: dpo`: the preferred answer of each pair becomes likelier than the other one, seen from a reference.

The loss is a mean over the pairs of the global batch. Balancers see both sequences of a pair as samples of their own;
the reference's forwards are evaluations, which nothing counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe.checkpoint.progress import Progress
from ds_moe.config.rules.dpo import reference_of
from ds_moe.data.batch import NO_LOSS
from ds_moe.data.eval_set import EvalBatch
from ds_moe.distributed import over_ranks
from ds_moe.models.head import targets_of
from ds_moe.monitor.reports import EvalReport
from ds_moe.tasks.answers import Answered, Judged
from ds_moe.tasks.dpo.objective import Preference, preference
from ds_moe.tasks.dpo.pair_record import Pair
from ds_moe.tasks.dpo.pairs import PairBatch
from ds_moe.tasks.dpo.reference import BaseReference, PairReference, pair_logprobs
from ds_moe.tasks.dpo.stored import StoredReference
from ds_moe.tasks.rl.router_watch import RouterWatch
from ds_moe.tasks.task import Task, TrainingParts

REFERENCES: dict[str, Callable[[TrainingParts], PairReference]] = {"base": BaseReference, "stored": StoredReference}
REFERENCE_IS = {
    "base": "the reference is the model without its low-rank updates",
    "stored": "the reference is the model before the first step, its log-probs stored",
    "none": "without a reference",
}
# Figure -> the count that its sum is divided by.
FIGURES = {
    **dict.fromkeys(
        ("reward_chosen", "reward_rejected", "margin", "accuracy", "logp_chosen", "logp_rejected"), "pairs"
    ),
    "nll_chosen": "pairs",  # mean over a preferred answer's tokens, then over pairs
    "routers_changed": "routers",  # share of (token, MoE layer) where the policy would take others than the reference
}


class PreferenceOptimization(Task):
    """The task of a run with `task: dpo`. Make it before a checkpoint is loaded: a reference may have to be scored."""

    def __init__(self, parts: TrainingParts) -> None:
        super().__init__(parts)
        self.config = parts.config.dpo
        made = REFERENCES.get(reference_of(parts.config))
        self.reference = None if made is None else made(parts)
        knows_experts = isinstance(self.reference, BaseReference) and self.reference.records
        self.watch = RouterWatch(parts.layers, "none") if knows_experts else None
        self._sums: dict[str, Tensor] = {}

    def steps(self, progress: Progress) -> Iterator[list[PairBatch]]:
        """Micro-batches with the reference's log-probs."""
        for micro_batches in super().steps(progress):
            began = time.perf_counter()
            scored = [self._with_reference(batch, "train") for batch in micro_batches]
            self.scoring_s = time.perf_counter() - began
            yield scored

    def _with_reference(self, batch: PairBatch, split: str) -> PairBatch:
        return batch if self.reference is None else self.reference.added_to(batch, split)

    def weight(self, batch: PairBatch) -> Tensor:
        return batch.real_P.sum()

    def loss(self, batch: PairBatch, share: float) -> Tensor:
        found, logprob_P2 = self._compared(batch)
        self._add(self._figures(found, logprob_P2, batch.real_P))
        total = torch.where(batch.real_P, found.loss_P, 0).sum() / share
        return total.float()  # as balancers' losses are

    def _compared(self, batch: PairBatch) -> tuple[Preference, Tensor]:
        """What the objective makes of a micro-batch, and its (P, 2) log-probs (collective)."""
        if self.watch is not None:
            self.watch.begin(batch.reference_routing)
        logprob_P2, tokens_P2 = pair_logprobs(self.parts.engine, batch)
        if self.watch is not None:
            self.watch.end()
            changed = self.watch.differences((targets_of(batch.labels) != NO_LOSS).flatten())
            self._add({name: changed[name] for name in ("routers", "routers_changed")})
        return preference(self.config, logprob_P2, batch.reference_P2, tokens_P2), logprob_P2.detach()

    def _figures(self, found: Preference, logprob_P2: Tensor, real_P: Tensor) -> dict[str, Tensor]:
        """Sums over real pairs."""
        chosen_P, rejected_P = found.reward_P2.unbind(-1)
        values = {
            "reward_chosen": chosen_P,
            "reward_rejected": rejected_P,
            "margin": chosen_P - rejected_P,
            "accuracy": chosen_P > rejected_P,
            "logp_chosen": logprob_P2[:, 0],
            "logp_rejected": logprob_P2[:, 1],
            "nll_chosen": found.nll_P,
        }
        sums = {name: torch.where(real_P, value.double(), 0).sum() for name, value in values.items()}
        return sums | {"pairs": real_P.sum().double()}

    def _add(self, sums: dict[str, Tensor]) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def metrics(self, progress: Progress) -> dict[str, float]:
        sums, self._sums = self._sums, {}
        totals = torch.stack(list(sums.values()))
        dist.all_reduce(totals)
        return _means(dict(zip(sums, totals.tolist(), strict=True)))

    def evaluate(
        self,
        step: int,
        limit: int | None,
        each_batch: Callable[[], None],
        note: Callable[[list[Answered]], None] = lambda answered: None,
    ) -> EvalReport:
        """Held-out loss, and the share of pairs whose preferred answer has the larger reward (collective)."""
        training, self._sums = self._sums, {}
        report = super().evaluate(step, limit, each_batch, note)
        sums, self._sums = self._sums, training
        all_sums = over_ranks({name: float(value) for name, value in sums.items()})
        total = {name: sum(one.get(name, 0.0) for one in all_sums) for name in {key for one in all_sums for key in one}}
        scalars = {f"eval/{name}": value for name, value in _means(total).items() if name != "accuracy"}
        return replace(report, scalars=scalars)

    def judges(self) -> Callable[[EvalBatch], Judged]:
        """By the loss of pairs, and by which answer has the larger reward."""

        def judged(batch: EvalBatch) -> Judged:
            pairs = self._with_reference(batch.batch, "held-out").to(self.parts.topology.device)
            self.parts.engine.eval()  # which scoring the reference ends
            found, logprob_P2 = self._compared(pairs)
            self._add(self._figures(found, logprob_P2, pairs.real_P))
            margin_P = (-found.reward_P2.diff()).flatten().tolist()
            answered = [
                (_answered(sample, margin > 0), sample)
                for sample, margin in zip(batch.samples, margin_P, strict=True)
                if isinstance(sample, Pair)
            ]
            return Judged(torch.where(pairs.real_P, found.loss_P, 0).sum().item(), len(answered), answered)

        return judged


def _means(sums: dict[str, float]) -> dict[str, float]:
    return {name: sums[name] / sums[n] for name, n in FIGURES.items() if name in sums and sums[n] > 0}


def _answered(pair: Pair, preferred: bool) -> Answered:
    """An evaluation's sample: its prediction is the answer with the larger reward."""
    chosen, rejected = pair.answers
    return Answered(pair.where, pair.kind, pair.last_question(), chosen, chosen if preferred else rejected)
