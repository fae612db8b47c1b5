"""What routing decides, and what travels beside the hidden states while a model runs.

Shape suffixes used in this package (after Noam Shazeer; one letter a dimension):

    T tokens of a micro-batch     D model width      F expert width       B batch    S sequence
    V tokens that are no padding  E experts          e experts of a rank  K top-k    L MoE layers
    N assignments (token, expert) R rows a rank receives for its experts
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Assignments(NamedTuple):
    """N pairs of token and expert, without a gradient."""

    token_N: Tensor  # int64, index into T
    expert_N: Tensor  # int64, global expert id
    seed: int | None = None  # of the random numbers that went with this selection; None: there were none
    top_k: int | None = None  # every token has this many, beside each other, tokens in order; None: not known

    def where(self, kept_N: Tensor) -> Assignments:
        """The pairs at which the mask is true, in their order."""
        return self._replace(token_N=self.token_N[kept_N], expert_N=self.expert_N[kept_N], top_k=None)

    def replaced(self, replayed_TK: Tensor) -> Assignments:
        """The same tokens with the experts of `replayed_TK`, but for those whose row there is -1.

        The list must hold K assignments of each token beside each other.
        """
        replayed_VK = replayed_TK[self.token_N[:: replayed_TK.shape[1]]].to(torch.int64)
        live_V1 = replayed_VK[:, :1] < 0
        return self._replace(expert_N=torch.where(live_V1, self.expert_N.view_as(replayed_VK), replayed_VK).flatten())


class RoutingDecision(NamedTuple):
    """Which token goes to which expert and with what weight, as a list of N assignments.

    Top-k routing of V tokens gives N = V * K; a capacity limit, expert dropout, a padding mask or expert
    choice are just other lists. A tuple whose first field is the logits is what transformers' recorder of
    router logits expects from a module that subclasses the family's router.
    """

    logits_TE: Tensor  # raw router logits of every token, model dtype, with grad
    scores_TE: Tensor  # fp32 scores (softmax or sigmoid), with grad
    token_N: Tensor  # int64, index into T
    expert_N: Tensor  # int64, global expert id
    weight_N: Tensor  # fp32 combine weight, with grad
    seed: int | None = None  # of the router's random numbers in this forward; None: it drew none
    dropped: int = 0  # assignments that the experts' capacity refused; 0 in a recompute
    top_k: int | None = None  # as in `Assignments`

    @property
    def chosen(self) -> Assignments:
        return Assignments(self.token_N, self.expert_N, self.seed, self.top_k)


@dataclass
class ForwardContext:
    """Facts of the micro-batch in flight, shared by all MoE layers of one model.

    The converter's hook on the decoder refreshes it at every forward, so that the layers, which only see
    hidden states, know what is padding and what is an image token.
    """

    token_V: Tensor | None = None  # int64 indices of the real tokens; None: every token is real
    real_B: Tensor | None = None  # bool, false for samples that only fill up the next forward's batch; used once
    image_T: Tensor | None = None  # bool, image tokens; None: there is none
    kind_B: Tensor | None = None  # int64 kind of each sample of the next forward's batch, -1 none; used once
    kind_T: Tensor | None = None  # int64, the same of each token; None: not known
    routing_BSLK: Tensor | None = None  # experts to replay in the next forward, -1 where the router decides; used once
    replayed_TLK: Tensor | None = None  # the same, of the forward in flight
    replay_moves_bias: bool = False  # whether replayed rows count for a loss-free bias
    aux_losses: list[Tensor] = field(default_factory=list)  # one scalar a layer and balancer, with grad

    def begin(self, mask_BS: Tensor | None, image_BS: Tensor | None) -> None:
        """Start a forward: `mask_BS` is non-zero at real tokens, `image_BS` is true at image tokens."""
        real_B, self.real_B = self.real_B, None
        if real_B is not None and mask_BS is not None:
            mask_BS = mask_BS.bool() & real_B.unsqueeze(1)
        real_T = None if mask_BS is None else mask_BS.reshape(-1).bool()
        self.token_V = None if real_T is None or bool(real_T.all()) else real_T.nonzero().squeeze(1)
        self.image_T = None if image_BS is None else image_BS.reshape(-1)
        kind_B, self.kind_B = self.kind_B, None
        known = kind_B is not None and mask_BS is not None
        self.kind_T = kind_B.unsqueeze(1).expand_as(mask_BS).reshape(-1) if known else None
        routing_BSLK, self.routing_BSLK = self.routing_BSLK, None
        self.replayed_TLK = None if routing_BSLK is None else routing_BSLK.flatten(0, 1)
        self.aux_losses = []


@dataclass
class Tape:
    """What one gradient-checkpointed region decided in its forward, for its recompute to repeat."""

    replaying: bool = False
    kept: dict[int, Any] = field(default_factory=dict)  # by MoE layer index


_TAPE: ContextVar[Tape | None] = ContextVar("ds_moe_tape", default=None)


def current_tape() -> Tape | None:
    """The tape of the checkpointed region that runs in this thread, if any."""
    return _TAPE.get()


@contextmanager
def _running(tape: Tape, replaying: bool) -> Iterator[None]:
    tape.replaying = replaying
    token = _TAPE.set(tape)
    try:
        yield
    finally:
        _TAPE.reset(token)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of `torch.utils.checkpoint.checkpoint`: one tape for a region's forward and its recompute.

    A recompute in other rounding (another kernel, another summation order) could flip a tie in top-k, and its
    counts would be counted twice. With the tape it repeats the forward's decision and reports nothing.
    """
    tape = Tape()
    return _running(tape, replaying=False), _running(tape, replaying=True)


def count_experts(expert_N: Tensor, num_experts: int) -> Tensor:
    """How often each of 0 ... `num_experts` - 1 occurs, int64. Not bincount, which reads its maximum on the host."""
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_N.device)
    return counts_E.scatter_add_(0, expert_N, torch.ones_like(expert_N))
