"""Rows from tokens to experts and back on one rank, with their gradients: gathers both ways, no scatter-add."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_moe.moe.backends import Backend, Order
from ds_moe.moe.decision import count_experts


def order_by_expert(
    backend: Backend, token_N: Tensor, expert_N: Tensor, tokens: int, num_experts: int, top_k: int | None
) -> Order:
    """The list of (token, expert) sorted by expert.

    Args:
        top_k: every token has this many assignments, beside each other, tokens in order; None: any list.
    """
    order_N, counts_E = backend.sort(expert_N, num_experts)
    place_N = inverse(order_N)
    if top_k is not None:
        start_T = torch.arange(0, expert_N.numel(), top_k, device=expert_N.device)
    else:
        place_N = place_N[torch.argsort(token_N, stable=True)]
        per_token_T = count_experts(token_N, tokens)
        start_T = per_token_T.cumsum(0) - per_token_T
    return Order(order_N, token_N.index_select(0, order_N), counts_E, place_N, start_T, top_k)


def spread(backend: Backend, x_TD: Tensor, order: Order) -> Tensor:
    """(T, D) -> (N, D): the token of each assignment, in sorted order."""
    return _Spread.apply(backend, x_TD, order)


def add_up(backend: Backend, rows_ND: Tensor, order: Order) -> Tensor:
    """(N, D) sorted rows -> (T, D) sums per token."""
    return _AddUp.apply(backend, rows_ND, order)


def permute(rows: Tensor, order_R: Tensor) -> Tensor:
    """`rows[order]` for a permutation."""
    return _Permute.apply(rows, order_R)


def inverse(order_N: Tensor) -> Tensor:
    """Of a permutation."""
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.numel(), device=order_N.device))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        return rows.index_select(0, order_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (order_R,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse(order_R)), None


class _Spread(torch.autograd.Function):
    """Tokens to rows; the gradients of a token's rows are added up."""

    @staticmethod
    def forward(ctx: Any, backend: Backend, x_TD: Tensor, order: Order) -> Tensor:
        _keep(ctx, backend, order)
        return backend.spread(x_TD, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.backend.add_up(grads[0].contiguous(), _kept(ctx)), None


class _AddUp(torch.autograd.Function):
    """Rows to tokens; the gradient of a token goes to each of its rows."""

    @staticmethod
    def forward(ctx: Any, backend: Backend, rows_ND: Tensor, order: Order) -> Tensor:
        _keep(ctx, backend, order)
        return backend.add_up(rows_ND, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.backend.spread(grads[0].contiguous(), _kept(ctx)), None


def _keep(ctx: Any, backend: Backend, order: Order) -> None:
    ctx.backend, ctx.top_k = backend, order.top_k
    ctx.save_for_backward(*order[:-1])


def _kept(ctx: Any) -> Order:
    return Order(*ctx.saved_tensors, ctx.top_k)
