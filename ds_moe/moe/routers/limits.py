"""Limits that remove assignments after the selection: expert dropout and the capacity of the experts.

Both are masks over the N assignments, true where one is kept, without a gradient.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from ds_moe.moe.decision import Assignments, count_experts

Drop = Literal["position", "score"]


def capacity(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    """The most rows an expert takes: `factor` times its fair share of `tokens` * K assignments, rounded up."""
    return math.ceil(round(factor * tokens * top_k / num_experts, 6))  # 1.1 * 10 is 11, not 11.000000000000002


def within_capacity(chosen: Assignments, scores_TE: Tensor, limit: int, drop: Drop) -> Tensor:
    """(N,) bool: true for the first `limit` assignments of each expert, in the order of tokens or of falling scores."""
    token_N, expert_N = chosen.token_N, chosen.expert_N
    order_N = torch.arange(expert_N.numel(), device=expert_N.device)
    if drop == "score":
        order_N = torch.argsort(scores_TE[token_N, expert_N], descending=True, stable=True)
    order_N = order_N[torch.argsort(expert_N[order_N], stable=True)]  # by expert, then by priority
    counts_E = count_experts(expert_N, scores_TE.shape[1])
    first_E = counts_E.cumsum(0) - counts_E
    place_N = torch.arange(expert_N.numel(), device=expert_N.device) - first_E[expert_N[order_N]]
    return torch.empty_like(place_N, dtype=torch.bool).index_put_((order_N,), place_N < limit)


def survives_dropout(token_N: Tensor, tokens: int, probability: float, generator: torch.Generator) -> Tensor:
    """(N,) bool: false with `probability` for each assignment, except that every token keeps at least one."""
    draw_N = torch.rand(token_N.shape, device=token_N.device, generator=generator)
    most_T = draw_N.new_zeros(tokens).scatter_reduce(0, token_N, draw_N, "amax")
    return (draw_N >= probability) | (draw_N == most_T[token_N])
