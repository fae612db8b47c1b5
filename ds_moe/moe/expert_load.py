"""How much work the tokens give each expert of a layer, summed for the monitor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ds_moe.moe.balance import TokenStats, normalized_scores
from ds_moe.moe.decision import RoutingDecision


class LoadTotals(NamedTuple):
    """Sums over the real tokens of one rank and layer."""

    counts_E: Tensor  # int64, assignments of each expert
    image_E: Tensor | int  # int64, of these, of image tokens; 0: there were none
    kind_GE: Tensor  # int64, of these, of tokens of each of the G kinds of records
    tokens: int
    uncovered: Tensor | int  # int64 scalar, of these, tokens that no expert took
    dropped: int  # assignments that the experts' capacity refused
    entropy: Tensor  # fp32 scalar, nats, of the normalised scores
    pairs_EE: Tensor | None  # int64, tokens that use both experts; the diagonal holds the counts; None: not counted

    def plus(self, other: LoadTotals) -> LoadTotals:
        """The sums over the tokens of both. Pairs are kept if only one of them has counted them."""
        both = zip(self, other, strict=True)
        return LoadTotals(*(one if two is None else two if one is None else one + two for one, two in both))


class ExpertLoad:
    """The load of one layer's E experts by this rank's tokens, since the last `take`.

    Every forward in training is added, so what is known on the host stays there: an accelerator would spend as long on
    launching such additions as on a layer's products.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.kinds = 0  # G, how many kinds of records to count apart
        self.count_pairs = False  # costs a matrix product of (E, T) and (T, E) for each micro-batch
        self._totals: LoadTotals | None = None

    @torch.no_grad()
    def add(
        self, decision: RoutingDecision, stats: TokenStats, image_T: Tensor | None, kind_T: Tensor | None = None
    ) -> None:
        """Add one micro-batch; `image_T` and `kind_T` are those of `ForwardContext`."""
        scores_VE = normalized_scores(decision, stats)
        new = LoadTotals(
            counts_E=stats.counts_E,
            image_E=0 if image_T is None else self._counts(decision, image_T.long() - 1, groups=1)[0],
            kind_GE=self._counts(decision, kind_T, groups=self.kinds),
            tokens=scores_VE.shape[0],
            uncovered=_uncovered(decision, scores_VE.shape[0]),
            dropped=decision.dropped,
            entropy=torch.special.entr(scores_VE).sum(),
            pairs_EE=_pairs(decision) if self.count_pairs else None,
        )
        self._totals = new if self._totals is None else self._totals.plus(new)

    def _counts(self, decision: RoutingDecision, group_T: Tensor | None, groups: int) -> Tensor:
        """(groups, E) assignments of the tokens of each group; tokens of group -1 count for none."""
        counts = decision.expert_N.new_zeros((groups + 1) * self.num_experts)  # the first row is for group -1
        if groups and group_T is not None:
            place_N = (group_T[decision.token_N] + 1) * self.num_experts + decision.expert_N
            counts.scatter_add_(0, place_N, torch.ones_like(place_N))
        return counts.view(-1, self.num_experts)[1:]

    @property
    def counts_E(self) -> Tensor | int:
        """The counts so far; 0 when nothing was added."""
        return 0 if self._totals is None else self._totals.counts_E

    def take(self) -> LoadTotals | None:
        """Return the totals, None if nothing was added, and start again from zero."""
        totals, self._totals = self._totals, None
        return totals


def _uncovered(decision: RoutingDecision, tokens: int) -> Tensor | int:
    """How many of the real tokens no expert took; none where every token has K."""
    if decision.top_k is not None:
        return 0
    covered_T = decision.token_N.new_zeros(decision.logits_TE.shape[0], dtype=torch.bool)
    covered_T[decision.token_N] = True
    return tokens - covered_T.sum()


def _pairs(decision: RoutingDecision) -> Tensor:
    chosen_TE = torch.zeros_like(decision.scores_TE, dtype=torch.float32)
    chosen_TE[decision.token_N, decision.expert_N] = 1.0
    return (chosen_TE.T @ chosen_TE).to(torch.int64)  # exact: no count of a micro-batch reaches 2^24
