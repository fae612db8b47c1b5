"""What the tokens ask of a layer's experts, summed up for the monitor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ds_moe.moe.balance import Seen, shares
from ds_moe.moe.routing import RoutingDecision


class LoadTotals(NamedTuple):
    """Sums over the tokens of one rank and layer."""

    counts_E: Tensor  # int64, assignments of each expert
    image_E: Tensor  # int64, of these, of image tokens
    tokens: Tensor  # int64 scalar, padding left out
    uncovered: Tensor  # int64 scalar, of these, tokens that no expert took
    dropped: Tensor  # int64 scalar, assignments lost to a capacity limit or to expert dropout
    entropy: Tensor  # fp32 scalar, nats
    pairs_EE: Tensor | None  # int64, tokens that use both experts; the diagonal holds the counts


class Load:
    """What this rank's tokens asked of one layer's experts since the last `take`.

    Args:
        num_experts: E.
        top_k: assignments a token would have without drops; None where a token has no fixed number.
    """

    def __init__(self, num_experts: int, top_k: int | None = None) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.count_pairs = False  # a matrix product of (E, T) and (T, E) a micro-batch
        self._totals: LoadTotals | None = None

    @torch.no_grad()
    def add(self, decision: RoutingDecision, seen: Seen, image_T: Tensor | None) -> None:
        counts_E = seen.counts_E
        image_E = torch.zeros_like(counts_E)
        if image_T is not None:
            on_image_N = image_T[decision.token_N].to(torch.int64)
            image_E = image_E.scatter_add(0, decision.expert_N, on_image_N)
        shares_VE = shares(decision, seen)
        tokens = counts_E.new_tensor(shares_VE.shape[0])
        covered_T = torch.zeros(decision.logits_TE.shape[0], dtype=torch.bool, device=counts_E.device)
        covered_T[decision.token_N] = True
        dropped = tokens * self.top_k - counts_E.sum() if self.top_k is not None else torch.zeros_like(tokens)
        pairs_EE = _pairs(decision) if self.count_pairs else None
        entropy = torch.special.entr(shares_VE).sum()
        new = LoadTotals(counts_E, image_E, tokens, tokens - covered_T.sum(), dropped, entropy, pairs_EE)
        self._totals = new if self._totals is None else LoadTotals(*map(_sum, self._totals, new))

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
