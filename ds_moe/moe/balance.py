"""Balancers keep the experts evenly loaded. They compose: each adds a term to the loss.

A new kind is one class and one line in `BALANCERS`. No balancer is the empty list; the kind `loss_free` adds nothing to
the loss, because it is part of the router (`loss_free.py`).
"""

from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe.distributed import SequenceGroup
from ds_moe.moe.decision import RoutingDecision, count_experts

Scope = Literal["micro_batch", "global_batch", "sequence"]


class GlobalCounts(NamedTuple):
    """Sums over the micro-batches that all ranks run at the same time."""

    counts_E: Tensor  # int64, assignments of each expert
    tokens: Tensor  # int64 scalar, padding left out
    ranks: int


class SharedCounts(NamedTuple):
    """Sums over the parts of a micro-batch that several ranks share."""

    counts_BE: Tensor  # int64, assignments of each sequence and expert
    tokens_B: Tensor  # int64, padding left out
    ranks: int


class Occupancy(NamedTuple):
    """How full an optimizer step's micro-batches are, over all ranks; the last step of an epoch has empty ones, and so
    have packed rows that are fewer than the ranks.

    Losses are averaged over all micro-batches and ranks. Divided by one of these, a loss is a mean over what is there.
    """

    sequences: float  # real sequences of a micro-batch, mean
    micro_batches: float  # share of the micro-batches that hold a real sequence
    micro_steps: float  # share of the micro-steps in which some rank's micro-batch holds one


class TokenStats(NamedTuple):
    """What a balancer may know about a micro-batch beside the decision; nothing here has a gradient."""

    token_V: Tensor | None  # int64 indices of the real tokens (not padding); None: all
    sequences: int  # B
    counts_E: Tensor  # int64, this rank's assignments of each expert
    global_counts: GlobalCounts | None = None  # None unless some balancer's scope is global_batch
    sequence_T: Tensor | None = None  # int64 sequence of each token; None: B of equal length, padding included
    shared: SharedCounts | None = None  # None: this rank has the whole micro-batch
    occupancy: Occupancy | None = None  # of this micro-batch's optimizer step; None: it is all of the step


class Balancer(Protocol):
    """Turns the decision of a layer into a loss term.

    A recompute calls it again and discards the result, so it must hold no state and run no collective.
    """

    scope: Scope

    def loss(self, decision: RoutingDecision, stats: TokenStats) -> Tensor:
        """The term to add to the micro-batch's loss: a scalar with grad, already weighted.

        The trainer averages it over the micro-batches and ranks of an optimizer step. Where some of these hold fillers
        alone, `stats.occupancy` makes the average one over the others.
        """
        ...


class AuxLoss:
    """Switch Transformer's load-balancing loss (Fedus 2021, eq. 4-6) of one layer, over real tokens.

    `weight * E * sum_i f_i * P_i`, where f_i is the share of tokens that use expert i (the f_i sum to K) and P_i the
    mean score of expert i, each token's scores divided by their sum. Perfectly balanced it is `weight * K`, or `weight`
    with `normalize_by_k`. Padding enters neither.

    Args:
        scope: over which tokens f and P are taken. `micro_batch`: those of one forward of this rank, so that the loss
            depends on micro_batch_size; all of the optimizer step's count alike, but for those without a real token,
            which do not count. `global_batch` (Qiu 2025, arXiv 2501.11873): those of the forwards that all ranks run
            at the same time; averaged over the ranks, it equals the loss of their concatenated micro-batches. The
            micro-batches of gradient accumulation stay apart, and count as with `micro_batch`. `sequence`
            (DeepSeek-V3): those of each sequence, averaged over the sequences that have a real token: all of the
            optimizer step's count alike, however many a micro-batch holds. Ranks that share a micro-batch share its
            loss: each adds its own tokens' part, times the ranks, so that the average over all ranks is what it would
            be without them.
        normalize_by_k: divide by K = assignments a token.
    """

    def __init__(self, weight: float, scope: Scope = "micro_batch", normalize_by_k: bool = False) -> None:
        self.weight = weight
        self.scope: Scope = scope
        self.normalize_by_k = normalize_by_k

    def loss(self, decision: RoutingDecision, stats: TokenStats) -> Tensor:
        if self.scope == "sequence":
            sums_GE, counts_GE, tokens_G, groups = _over_sequences(decision, stats)
        else:
            sums_GE, counts_GE, tokens_G, groups = _over_batch(decision, stats, self.scope)
        tokens_G1 = tokens_G.clamp_min(1).unsqueeze(1)
        f_GE, p_GE = counts_GE.float() / tokens_G1, sums_GE / tokens_G1
        loss = self.weight * counts_GE.shape[1] * (f_GE * p_GE).sum() / groups
        if self.normalize_by_k:
            loss = loss * (tokens_G.sum() / counts_GE.sum().clamp_min(1))
        return loss


class ZLoss:
    """Keeps logits small (Zoph 2022, ST-MoE, eq. 5).

    It is `weight * mean(logsumexp(logits)^2)` over the real tokens of a micro-batch; all of the optimizer step's that
    have some count alike.
    """

    scope: Scope = "micro_batch"

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def loss(self, decision: RoutingDecision, stats: TokenStats) -> Tensor:
        logits_VE = _real(decision.logits_TE, stats).float()
        total = self.weight * logits_VE.logsumexp(-1).square().sum() / _filled(stats)
        if stats.shared is not None:
            return stats.shared.ranks * total / stats.shared.tokens_B.sum().clamp_min(1)
        return total / max(logits_VE.shape[0], 1)


def global_counts(token_V: Tensor | None, tokens: int, counts_E: Tensor) -> GlobalCounts:
    """Sum the counts of all ranks (collective: a forward may call it, a recompute must not). `tokens` is T."""
    real = tokens if token_V is None else token_V.numel()
    sums = torch.cat([counts_E, counts_E.new_tensor([real])])
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        ranks = dist.get_world_size()
        dist.all_reduce(sums)
    return GlobalCounts(sums[:-1], sums[-1], ranks)


def shared_counts(decision: RoutingDecision, stats: TokenStats, group: SequenceGroup) -> SharedCounts:
    """Sum the counts of the ranks that share this micro-batch (collective, as `global_counts`)."""
    counts_BE, tokens_B = _by_sequence(decision, stats)
    sums = torch.cat([counts_BE, tokens_B.unsqueeze(1)], dim=1)
    dist.all_reduce(sums, group=group.group)
    return SharedCounts(sums[:, :-1], sums[:, -1], group.size)


# Of G groups of tokens: sums of scores (G, E), assignments (G, E) and tokens (G,), then what the sum of their losses is
# divided by so that the average over an optimizer step's micro-batches is one over its groups.
_Groups = tuple[Tensor, Tensor, Tensor, Tensor | float]


def _filled(stats: TokenStats) -> float:
    return 1.0 if stats.occupancy is None else stats.occupancy.micro_batches


def _over_batch(decision: RoutingDecision, stats: TokenStats, scope: Scope) -> _Groups:
    scores_VE = normalized_scores(decision, stats)
    sums_E = scores_VE.sum(0)
    if scope == "global_batch" and stats.global_counts is not None:
        # The loss needs the score sums of all ranks. Each rank contributes its own, times the number of ranks: the
        # trainer's average of the ranks' losses then is the loss of the sums.
        counts_E, tokens, ranks = stats.global_counts
        filled = 1.0 if stats.occupancy is None else stats.occupancy.micro_steps
        return ranks * sums_E.unsqueeze(0), counts_E.unsqueeze(0), tokens.view(1), filled
    if stats.shared is not None:
        counts_BE, tokens_B, ranks = stats.shared
        return ranks * sums_E.unsqueeze(0), counts_BE.sum(0, keepdim=True), tokens_B.sum().view(1), _filled(stats)
    tokens = stats.counts_E.new_tensor([scores_VE.shape[0]])
    return sums_E.unsqueeze(0), stats.counts_E.unsqueeze(0), tokens, _filled(stats)


def _over_sequences(decision: RoutingDecision, stats: TokenStats) -> _Groups:
    sums_BE = decision.scores_TE.new_zeros(stats.sequences, decision.scores_TE.shape[1])
    sums_BE = sums_BE.index_add(0, _sequence_V(decision, stats), normalized_scores(decision, stats))
    if stats.shared is not None:
        counts_BE, tokens_B, ranks = stats.shared
        sums_BE = ranks * sums_BE
    else:
        counts_BE, tokens_B = _by_sequence(decision, stats)
    groups = (tokens_B > 0).sum().clamp_min(1) if stats.occupancy is None else stats.occupancy.sequences
    return sums_BE, counts_BE, tokens_B, groups


def _by_sequence(decision: RoutingDecision, stats: TokenStats) -> tuple[Tensor, Tensor]:
    """(B, E) assignments and (B,) real tokens of each sequence, of those of this rank."""
    experts = decision.logits_TE.shape[1]
    place_N = _sequence_T(decision, stats)[decision.token_N] * experts + decision.expert_N
    counts_BE = count_experts(place_N, stats.sequences * experts).view(-1, experts)
    return counts_BE, torch.bincount(_sequence_V(decision, stats), minlength=stats.sequences)


def _sequence_T(decision: RoutingDecision, stats: TokenStats) -> Tensor:
    if stats.sequence_T is not None:
        return stats.sequence_T
    tokens = decision.logits_TE.shape[0]
    length = max(tokens // max(stats.sequences, 1), 1)  # without tokens there is nothing to place
    return torch.arange(tokens, device=decision.logits_TE.device) // length


def _sequence_V(decision: RoutingDecision, stats: TokenStats) -> Tensor:
    sequence_T = _sequence_T(decision, stats)
    return sequence_T if stats.token_V is None else sequence_T[stats.token_V]


def normalized_scores(decision: RoutingDecision, stats: TokenStats) -> Tensor:
    """(V, E) scores of the real tokens, divided by each token's sum (which a softmax has made 1 already)."""
    scores_VE = _real(decision.scores_TE, stats)
    return scores_VE / scores_VE.sum(-1, keepdim=True).clamp_min(1e-20)


def _real(values_TE: Tensor, stats: TokenStats) -> Tensor:
    return values_TE if stats.token_V is None else values_TE.index_select(0, stats.token_V)


BALANCERS = {"aux": AuxLoss, "z_loss": ZLoss}
