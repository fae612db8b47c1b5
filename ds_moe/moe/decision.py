"""The legend of shapes, and the routing decision that routers make and dispatchers carry out.

Shape suffixes used in this package (after Noam Shazeer; one letter a dimension):

    T tokens of a micro-batch     D model width      F expert width       B batch    S sequence
    V tokens that are no padding  E experts          e experts of a rank  K top-k    L MoE layers
    N assignments (token, expert) R rows a rank receives for its experts
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Assignments(NamedTuple):
    """N pairs of token and expert, without a gradient."""

    token_N: Tensor  # int64, index into T
    expert_N: Tensor  # int64, global expert id
    seed: int | None = None  # of the random numbers that the router drew for this selection; None: it drew none
    top_k: int | None = None  # every token has this many, beside each other, tokens in order; None: not known

    def where(self, kept_N: Tensor) -> Assignments:
        """The pairs at which the mask is true, in their order."""
        return self._replace(token_N=self.token_N[kept_N], expert_N=self.expert_N[kept_N], top_k=None)

    def replaced(self, replayed_TK: Tensor) -> Assignments:
        """The same tokens with the experts of `replayed_TK`; a token whose row there is -1 keeps its own.

        This list must hold K assignments of each token, beside each other.
        """
        replayed_VK = replayed_TK[self.token_N[:: replayed_TK.shape[1]]].to(torch.int64)
        live_V1 = replayed_VK[:, :1] < 0
        return self._replace(expert_N=torch.where(live_V1, self.expert_N.view_as(replayed_VK), replayed_VK).flatten())


class RoutingDecision(NamedTuple):
    """Which token goes to which expert and with what weight, as a list of N assignments.

    Top-k routing of V tokens gives N = V * K; a capacity limit, expert dropout, a padding mask or expert choice are
    just other lists. It is a tuple whose first field is the logits because transformers, which records the router
    logits of modules that subclass the family's router, expects that.
    """

    logits_TE: Tensor  # raw router logits of every token, model dtype, with grad
    scores_TE: Tensor  # fp32 scores (softmax or sigmoid), with grad
    token_N: Tensor  # int64, index into T
    expert_N: Tensor  # int64, global expert id
    weight_N: Tensor  # fp32 combine weight, with grad
    seed: int | None = None  # of the random numbers that the router drew in this forward; None: it drew none
    dropped: int = 0  # assignments that the experts' capacity refused; 0 in a recompute
    top_k: int | None = None  # as in `Assignments`

    @property
    def chosen(self) -> Assignments:
        """The selection alone, for a recompute to repeat."""
        return Assignments(self.token_N, self.expert_N, self.seed, self.top_k)


def count_experts(expert_N: Tensor, num_experts: int) -> Tensor:
    """How often each of 0 ... `num_experts` - 1 occurs, int64 (E,). torch.bincount would wait for the device."""
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_N.device)
    return counts_E.scatter_add_(0, expert_N, torch.ones_like(expert_N))
