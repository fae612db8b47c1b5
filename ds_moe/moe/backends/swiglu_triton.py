"""The passes between SwiGLU's products as one Triton kernel each way; `swiglu.py` has them in torch.

A row is read once and written once. torch's operators take several passes over fp32 copies, which on a GPU cost a
fifth of the products' time by their bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 4096  # columns that a program takes at a time


@triton.jit
def _forward(both, weight, weighted, width, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """A row of (R, 2F) first products -> a row of (R, F)."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(both + row * 2 * width + column, inside, 0.0).to(tl.float32)
        up = tl.load(both + row * 2 * width + width + column, inside, 0.0).to(tl.float32)
        act = gate * tl.sigmoid(gate) * up
        if WEIGHTED:
            act = act * tl.load(weight + row)
        tl.store(weighted + row * width + column, act.to(weighted.dtype.element_ty), inside)


@triton.jit
def _backward(both, weight, grad, weighted, grad_both, grad_weight, width, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """A row of the weighted activation's gradient -> the weighted activation again, and the gradients of both products
    and of the row's weight."""
    row = tl.program_id(0).to(tl.int64)
    total = 0.0
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(both + row * 2 * width + column, inside, 0.0).to(tl.float32)
        up = tl.load(both + row * 2 * width + width + column, inside, 0.0).to(tl.float32)
        upstream = tl.load(grad + row * width + column, inside, 0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        act = silu * up
        if WEIGHTED:
            total += tl.sum(upstream * act)
            share = tl.load(weight + row)
            act = act * share
            upstream = upstream * share
        tl.store(weighted + row * width + column, act.to(weighted.dtype.element_ty), inside)
        of_gate = upstream * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(grad_both + row * 2 * width + column, of_gate.to(grad_both.dtype.element_ty), inside)
        of_up = upstream * silu
        tl.store(grad_both + row * 2 * width + width + column, of_up.to(grad_both.dtype.element_ty), inside)
    if WEIGHTED:
        tl.store(grad_weight + row, total)


def takes(both_RO: Tensor, weight_R: Tensor | None) -> bool:
    """Whether the kernels compute what torch's operators would: sums and weights in fp32, rows without gaps."""
    narrow = both_RO.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return narrow and both_RO.is_contiguous() and (weight_R is None or weight_R.dtype == torch.float32)


def activate(both_RO: Tensor, weight_R: Tensor | None) -> Tensor:
    """`swiglu._activate`, which keeps no activation: the backward kernel has it for nothing."""
    rows, width = both_RO.shape[0], both_RO.shape[1] // 2
    weighted_RF = both_RO.new_empty(rows, width)
    if rows:
        _forward[(rows,)](both_RO, weight_R, weighted_RF, width, WEIGHTED=weight_R is not None, BLOCK=_block(width))
    return weighted_RF


def activate_backward(
    both_RO: Tensor, weight_R: Tensor | None, grad_RF: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`swiglu._activate_backward`."""
    rows, width = grad_RF.shape
    weighted_RF, grad_both_RO = torch.empty_like(grad_RF), torch.empty_like(both_RO)
    grad_weight_R = None if weight_R is None else torch.empty_like(weight_R)
    if rows:
        results = weighted_RF, grad_both_RO, grad_weight_R
        settings = {"WEIGHTED": weight_R is not None, "BLOCK": _block(width)}
        _backward[(rows,)](both_RO, weight_R, grad_RF.contiguous(), *results, width, **settings)
    return weighted_RF, grad_both_RO, grad_weight_R


def _block(width: int) -> int:
    return min(WIDEST, triton.next_power_of_2(width))
