"""Routers that learn nothing, for benchmarks to compare with. Their weight is not used and gets no gradient."""

import math

import torch
from torch import Tensor

from ds_moe.moe.decision import Assignments
from ds_moe.moe.routers.base import Router, routed


class FixedRouter(Router):
    """Prefers no expert: logits 0, scores 1/E. Each of a token's n experts (K without drops) weighs 1/n."""

    def logits(self, x_TD: Tensor) -> Tensor:
        return x_TD.new_zeros(x_TD.shape[0], self.weight.shape[0])

    def weigh(self, scores_TE: Tensor, chosen: Assignments, tokens: int) -> Tensor:
        per_token_T = torch.bincount(chosen.token_N, minlength=scores_TE.shape[0])
        return per_token_T[chosen.token_N].to(scores_TE.dtype).reciprocal()


class HashRouter(FixedRouter, kind="hash"):
    """K distinct experts from a hash of the token's index in the micro-batch. Loads are even on average only.

    Hash layers (Roller 2021) hash the token's id, which a router does not see. Here the same word at another place gets
    other experts.
    """

    def select(self, ranked_TE: Tensor, token_V: Tensor | None) -> Assignments:
        every_k = self.top_k if token_V is None else None
        token_V, ranked_VE = routed(ranked_TE, token_V)
        experts = ranked_VE.shape[1]
        hash_V1 = _mix(token_V).unsqueeze(1)
        strides = [stride for stride in range(1, experts + 1) if math.gcd(stride, experts) == 1]
        # A stride coprime to E meets no expert twice.
        stride_V1 = token_V.new_tensor(strides)[_mix(hash_V1 + 1) % len(strides)]
        steps_K = torch.arange(self.top_k, device=token_V.device)
        expert_N = ((hash_V1 + stride_V1 * steps_K) % experts).flatten()
        return Assignments(token_V.repeat_interleave(self.top_k), expert_N, top_k=every_k)


class BalancedRouter(FixedRouter, kind="balanced"):
    """Round robin: assignment n goes to expert n mod E, so that loads differ by at most one."""

    def select(self, ranked_TE: Tensor, token_V: Tensor | None) -> Assignments:
        every_k = self.top_k if token_V is None else None
        token_V, ranked_VE = routed(ranked_TE, token_V)
        token_N = token_V.repeat_interleave(self.top_k)
        expert_N = torch.arange(token_N.numel(), device=token_N.device) % ranked_VE.shape[1]
        return Assignments(token_N, expert_N, top_k=every_k)


def _mix(value: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finalizer on non-negative int64: looks random, and is the same on every device."""
    value = value & 0xFFFFFFFF
    value = (value ^ (value >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    value = (value ^ (value >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return value ^ (value >> 16)
