"""Balancers: what keeps the experts evenly loaded. They compose; each says what it adds to the loss.

A new kind is one class and one line in `BALANCERS`. The kind `none` is the empty list; `loss_free` adds nothing to the
loss and is part of the router (`loss_free.py`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe.moe.decision import RoutingDecision, count_experts

Scope = Literal["micro_batch", "global_batch", "sequence"]


class Everywhere(NamedTuple):
    """One micro-batch of every data-parallel rank, together."""

    counts_E: Tensor  # int64, assignments of each expert
    tokens: Tensor  # int64 scalar, padding left out
    ranks: int


class Seen(NamedTuple):
    """What a balancer may know of a micro-batch beside the decision; nothing here has a gradient."""

    token_V: Tensor | None  # int64 indices of the tokens that are no padding; None: all
    sequences: int  # B; the T tokens are B sequences of equal length, padding included
    counts_E: Tensor  # int64, this rank's assignments of each expert
    everywhere: Everywhere | None = None  # only where a balancer's scope is global_batch


class Balancer(Protocol):
    """Sees the decisions of a layer. A recompute calls it again and discards the result: it must hold no state, and do
    nothing collective."""

    scope: Scope

    def loss(self, decision: RoutingDecision, seen: Seen) -> Tensor:
        """What this decision adds to the micro-batch's loss: a scalar with grad, already weighted.

        The trainer averages it over the micro-batches and ranks of an optimizer step.
        """
        ...


class AuxLoss:
    """Switch Transformer's load-balancing loss (Fedus 2021, eq. 4-6) of one layer, over real tokens.

    `weight * E * sum_i f_i * P_i`, where f_i is the share of tokens that use expert i (the f_i sum to K) and P_i the
    mean score of expert i, each token's scores divided by their sum. Perfectly balanced it is `weight * K`, or `weight`
    with `normalize_by_k`. Padding enters neither.

    Args:
        scope: over which tokens f and P are taken. `micro_batch`: of this rank and forward; another micro_batch_size
            gives another loss. `global_batch` (Qiu 2025, arXiv 2501.11873): of the forwards that all ranks run at the
            same time, so that averaged over the ranks it equals the loss of their concatenated micro-batches; steps of
            gradient accumulation stay apart. `sequence` (DeepSeek-V3): of each sequence, averaged over the sequences
            that have a token.
        normalize_by_k: divide by K = assignments a token.
    """

    def __init__(self, weight: float, scope: Scope = "micro_batch", normalize_by_k: bool = False) -> None:
        self.weight = weight
        self.scope: Scope = scope
        self.normalize_by_k = normalize_by_k

    def loss(self, decision: RoutingDecision, seen: Seen) -> Tensor:
        if self.scope == "sequence":
            sums_GE, counts_GE, tokens_G, groups = _by_sequence(decision, seen)
        else:
            sums_GE, counts_GE, tokens_G, groups = _together(decision, seen, self.scope)
        tokens_G1 = tokens_G.clamp_min(1).unsqueeze(1)
        f_GE, p_GE = counts_GE.float() / tokens_G1, sums_GE / tokens_G1
        loss = self.weight * counts_GE.shape[1] * (f_GE * p_GE).sum() / groups
        if self.normalize_by_k:
            loss = loss * (tokens_G.sum() / counts_GE.sum().clamp_min(1))
        return loss


class ZLoss:
    """Keeps logits small (Zoph 2022, ST-MoE, eq. 5): `weight * mean(logsumexp(logits)^2)` over the real tokens of a
    micro-batch."""

    scope: Scope = "micro_batch"

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def loss(self, decision: RoutingDecision, seen: Seen) -> Tensor:
        logits_VE = _real(decision.logits_TE, seen).float()
        return self.weight * logits_VE.logsumexp(-1).square().sum() / max(logits_VE.shape[0], 1)


def everywhere(token_V: Tensor | None, tokens: int, counts_E: Tensor) -> Everywhere:
    """Add up one micro-batch of all ranks (collective: a forward may call it, a recompute must not)."""
    real = tokens if token_V is None else token_V.numel()
    sums = torch.cat([counts_E, counts_E.new_tensor([real])])
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        ranks = dist.get_world_size()
        dist.all_reduce(sums)
    return Everywhere(sums[:-1], sums[-1], ranks)


# --- score sums and counts of G groups of tokens, tokens of each, and by how many groups the sum is divided

_Groups = tuple[Tensor, Tensor, Tensor, Tensor | int]


def _together(decision: RoutingDecision, seen: Seen, scope: Scope) -> _Groups:
    scores_VE = shares(decision, seen)
    sums_E = scores_VE.sum(0)
    if scope == "global_batch" and seen.everywhere is not None:
        # The sum over ranks of their score sums belongs here; each rank gives its own, and the average over the ranks
        # of the losses, times their number, adds them up.
        counts_E, tokens, ranks = seen.everywhere
        return ranks * sums_E.unsqueeze(0), counts_E.unsqueeze(0), tokens.view(1), 1
    tokens = seen.counts_E.new_tensor([scores_VE.shape[0]])
    return sums_E.unsqueeze(0), seen.counts_E.unsqueeze(0), tokens, 1


def _by_sequence(decision: RoutingDecision, seen: Seen) -> _Groups:
    tokens, experts = decision.logits_TE.shape
    length = tokens // seen.sequences
    counts_BE = count_experts(decision.token_N // length * experts + decision.expert_N, seen.sequences * experts)
    real_V = torch.arange(tokens, device=counts_BE.device) if seen.token_V is None else seen.token_V
    sequence_V = real_V // length
    sums_BE = decision.scores_TE.new_zeros(seen.sequences, experts)
    sums_BE = sums_BE.index_add(0, sequence_V, shares(decision, seen))
    tokens_B = torch.bincount(sequence_V, minlength=seen.sequences)
    return sums_BE, counts_BE.view(-1, experts), tokens_B, (tokens_B > 0).sum().clamp_min(1)


def shares(decision: RoutingDecision, seen: Seen) -> Tensor:
    """(V, E) scores of the real tokens; each token's sum to 1, as those of a softmax do anyway."""
    scores_VE = _real(decision.scores_TE, seen)
    return scores_VE / scores_VE.sum(-1, keepdim=True).clamp_min(1e-20)


def _real(values_TE: Tensor, seen: Seen) -> Tensor:
    return values_TE if seen.token_V is None else values_TE.index_select(0, seen.token_V)


BALANCERS = {"aux": AuxLoss, "z_loss": ZLoss}
