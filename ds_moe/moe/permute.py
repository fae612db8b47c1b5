"""Rows from tokens to experts and back on one rank, with their gradients.

Forward and backward are both gathers. There is no scatter-add, so sums have one order and the same bits every time.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ds_moe.moe.backends import Backend, Permutation
from ds_moe.moe.decision import count_experts

MoveRows = Callable[[Tensor, Permutation], Tensor]  # `Backend.to_experts` or `Backend.sum_per_token`


def sort_by_expert(
    backend: Backend, token_N: Tensor, expert_N: Tensor, tokens: int, num_experts: int, top_k: int | None
) -> Permutation:
    """Sort a list of (token, expert) of T `tokens` by expert; assignments of one expert keep their order.

    With `top_k` every token has this many, beside each other, tokens in order.
    """
    order_N, counts_E = backend.sort(expert_N, num_experts)
    place_N = inverse(order_N)
    if top_k is not None:
        start_T = torch.arange(0, expert_N.numel(), top_k, device=expert_N.device)
    else:
        place_N = place_N[torch.argsort(token_N, stable=True)]
        per_token_T = count_experts(token_N, tokens)
        start_T = per_token_T.cumsum(0) - per_token_T
    return Permutation(order_N, token_N.index_select(0, order_N), counts_E, place_N, start_T, top_k)


def to_experts(backend: Backend, x_TD: Tensor, permutation: Permutation) -> Tensor:
    """(T, D) -> (N, D): the token of each assignment, in sorted order."""
    return _Move.apply(backend.to_experts, backend.sum_per_token, x_TD, permutation)


def sum_per_token(backend: Backend, rows_ND: Tensor, permutation: Permutation) -> Tensor:
    """(N, D) sorted rows -> (T, D) sums per token."""
    return _Move.apply(backend.sum_per_token, backend.to_experts, rows_ND, permutation)


def permute(rows: Tensor, order_R: Tensor) -> Tensor:
    """`rows[order_R]`, where `order_R` holds each index once."""
    return _Permute.apply(rows, order_R)


def inverse(order_N: Tensor) -> Tensor:
    """The permutation that undoes `order_N`."""
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.numel(), device=order_N.device))


# Both functions keep their indices as attributes, which the plan of the dispatch holds anyway. As saved tensors, which
# gradient checkpointing computes again, those of the way back would have a recompute go on to the end of the layer: to
# the last product, its exchange and the sums, of which backward needs nothing.


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, order_R: Tensor) -> Tensor:
        ctx.order_R = order_R
        return rows.index_select(0, order_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, inverse(ctx.order_R)), None


class _Move(torch.autograd.Function):
    """Tokens to rows, or rows to tokens: in backward the gradients take the other way, which is each one's gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, there: MoveRows, back: MoveRows, values: Tensor, permutation: Permutation) -> Tensor:
        ctx.back, ctx.permutation = back, permutation
        return there(values, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[None, None, Tensor, None]:
        return None, None, ctx.back(grads[0].contiguous(), ctx.permutation), None
