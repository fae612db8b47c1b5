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
    image_E: Tensor  # int64, of these, of image tokens
    kind_GE: Tensor  # int64, of these, of tokens of each of the G kinds of records
    tokens: Tensor  # int64 scalar
    uncovered: Tensor  # int64 scalar, of these, tokens that no expert took
    dropped: Tensor  # int64 scalar, assignments that the experts' capacity refused
    entropy: Tensor  # fp32 scalar, nats, of the normalised scores
    pairs_EE: Tensor | None  # int64, tokens that use both experts; the diagonal holds the counts; None: not counted

    def plus(self, other: LoadTotals) -> LoadTotals:
        """The sums over the tokens of both. Pairs are kept if only one of them has counted them."""
        both = zip(self, other, strict=True)
        return LoadTotals(*(one if two is None else two if one is None else one + two for one, two in both))


class ExpertLoad:
    """The load of one layer's E experts by this rank's tokens, since the last `take`."""

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
        counts_E = stats.counts_E
        image_E = torch.zeros_like(counts_E)
        if image_T is not None:
            on_image_N = image_T[decision.token_N].to(torch.int64)
            image_E = image_E.scatter_add(0, decision.expert_N, on_image_N)
        scores_VE = normalized_scores(decision, stats)
        tokens = counts_E.new_full((), scores_VE.shape[0])
        covered_T = torch.zeros(decision.logits_TE.shape[0], dtype=torch.bool, device=counts_E.device)
        covered_T[decision.token_N] = True
        dropped = counts_E.new_full((), decision.dropped)
        pairs_EE = _pairs(decision) if self.count_pairs else None
        entropy = torch.special.entr(scores_VE).sum()
        kind_GE = self._by_kind(decision, kind_T)
        new = LoadTotals(counts_E, image_E, kind_GE, tokens, tokens - covered_T.sum(), dropped, entropy, pairs_EE)
        self._totals = new if self._totals is None else self._totals.plus(new)

    def _by_kind(self, decision: RoutingDecision, kind_T: Tensor | None) -> Tensor:
        counts = decision.expert_N.new_zeros((self.kinds + 1) * self.num_experts)  # the first row is for kind -1, none
        if self.kinds and kind_T is not None:
            place_N = (kind_T[decision.token_N] + 1) * self.num_experts + decision.expert_N
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


def _pairs(decision: RoutingDecision) -> Tensor:
    chosen_TE = torch.zeros_like(decision.scores_TE, dtype=torch.float32)
    chosen_TE[decision.token_N, decision.expert_N] = 1.0
    return (chosen_TE.T @ chosen_TE).to(torch.int64)  # exact: no count of a micro-batch reaches 2^24
