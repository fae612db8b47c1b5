"""What the tokens ask of a layer's experts, summed up for the monitor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ds_moe.moe.balance import Seen, shares
from ds_moe.moe.decision import RoutingDecision


class LoadTotals(NamedTuple):
    """Sums over the tokens of one rank and layer."""

    counts_E: Tensor  # int64, assignments of each expert
    image_E: Tensor  # int64, of these, of image tokens
    kind_GE: Tensor  # int64, of these, of tokens of each of the G kinds of records
    tokens: Tensor  # int64 scalar, padding left out
    uncovered: Tensor  # int64 scalar, of these, tokens that no expert took
    dropped: Tensor  # int64 scalar, assignments that the experts' capacity refused
    entropy: Tensor  # fp32 scalar, nats
    pairs_EE: Tensor | None  # int64, tokens that use both experts; the diagonal holds the counts


class Load:
    """What this rank's tokens asked of one layer's experts since the last `take`.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.kinds = 0  # kinds of records to tell apart, G
        self.count_pairs = False  # a matrix product of (E, T) and (T, E) a micro-batch
        self._totals: LoadTotals | None = None

    @torch.no_grad()
    def add(self, decision: RoutingDecision, seen: Seen, image_T: Tensor | None, kind_T: Tensor | None = None) -> None:
        counts_E = seen.counts_E
        image_E = torch.zeros_like(counts_E)
        if image_T is not None:
            on_image_N = image_T[decision.token_N].to(torch.int64)
            image_E = image_E.scatter_add(0, decision.expert_N, on_image_N)
        shares_VE = shares(decision, seen)
        tokens = counts_E.new_full((), shares_VE.shape[0])
        covered_T = torch.zeros(decision.logits_TE.shape[0], dtype=torch.bool, device=counts_E.device)
        covered_T[decision.token_N] = True
        dropped = counts_E.new_full((), decision.dropped)
        pairs_EE = _pairs(decision) if self.count_pairs else None
        entropy = torch.special.entr(shares_VE).sum()
        kind_GE = self._by_kind(decision, kind_T)
        new = LoadTotals(counts_E, image_E, kind_GE, tokens, tokens - covered_T.sum(), dropped, entropy, pairs_EE)
        self._totals = new if self._totals is None else LoadTotals(*map(_sum, self._totals, new))

    def _by_kind(self, decision: RoutingDecision, kind_T: Tensor | None) -> Tensor:
        counts = decision.expert_N.new_zeros((self.kinds + 1) * self.num_experts)  # the first row: tokens of no kind
        if self.kinds and kind_T is not None:
            place_N = (kind_T[decision.token_N] + 1) * self.num_experts + decision.expert_N
            counts.scatter_add_(0, place_N, torch.ones_like(place_N))
        return counts.view(-1, self.num_experts)[1:]

    @property
    def counts_E(self) -> Tensor | int:
        """The counts so far; 0 when nothing was added."""
        return 0 if self._totals is None else self._totals.counts_E

    def take(self) -> LoadTotals | None:
        """The totals, or None if nothing was added; start anew."""
        totals, self._totals = self._totals, None
        return totals


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def _pairs(decision: RoutingDecision) -> Tensor:
    chosen_TE = torch.zeros_like(decision.scores_TE, dtype=torch.float32)
    chosen_TE[decision.token_N, decision.expert_N] = 1.0
    return (chosen_TE.T @ chosen_TE).to(torch.int64)  # exact: no count of a micro-batch reaches 2^24
