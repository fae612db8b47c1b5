"""SiLU-gated experts as one autograd function: what it saves, and its gradients."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from shutil import which
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

Recompute = Literal["none", "act", "all"]
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # `Backend.product` or `Backend.outer`
# Bytes of a block of rows in fp32. On a CPU a block is small enough that one elementwise pass finds in the cache what
# the last one left there; on an accelerator it is large enough to keep the device busy, and small enough to be copied.
BLOCK_BYTES = {"cpu": 2**21, "accelerator": 2**28}


class SwiGLU(torch.autograd.Function):
    """`Backend.swiglu` in terms of its kernels.

    The combine weight multiplies the activation instead of the output, which is the same because the last product is
    linear. It costs a pass over F columns instead of D, and the gradient of the weight needs no saved output.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, product: Kernel, outer: Kernel, recompute: Recompute, *tensors: Tensor | None
    ) -> Tensor:
        rows_RD, gate_up_eOD, down_eDF, counts_e, weight_R = tensors
        both_RO = product(rows_RD, gate_up_eOD.transpose(-2, -1), counts_e)
        weighted_RF, act_RF = _activate(both_RO, weight_R, keep=recompute == "none")
        ctx.product, ctx.outer = product, outer
        ctx.save_for_backward(*tensors, None if recompute == "all" else both_RO, act_RF)
        return product(weighted_RF, down_eDF.transpose(-2, -1), counts_e)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, gate_up_eOD, down_eDF, counts_e, weight_R, both_RO, act_RF = ctx.saved_tensors
        product, outer = ctx.product, ctx.outer
        _, _, _, rows_wanted, gate_up_wanted, down_wanted, *_ = ctx.needs_input_grad
        grad_RD = grads[0].contiguous()  # autograd expands the gradient of a sum with stride 0
        if both_RO is None:
            both_RO = product(rows_RD, gate_up_eOD.transpose(-2, -1), counts_e)
        grad_RF = product(grad_RD, down_eDF, counts_e)
        weighted_RF, grad_both_RO, grad_weight_R = _activate_backward(both_RO, act_RF, weight_R, grad_RF)
        del grad_RF
        grad_down_eDF = outer(grad_RD, weighted_RF, counts_e) if down_wanted else None
        grad_gate_up_eOD = outer(grad_both_RO, rows_RD, counts_e) if gate_up_wanted else None
        grad_rows_RD = product(grad_both_RO, gate_up_eOD, counts_e) if rows_wanted else None
        return None, None, None, grad_rows_RD, grad_gate_up_eOD, grad_down_eDF, None, grad_weight_R


def _blocks(rows_RO: Tensor) -> Iterator[slice]:
    """Split the rows into blocks of at most `BLOCK_BYTES` in fp32."""
    block_bytes = BLOCK_BYTES["cpu" if rows_RO.device.type == "cpu" else "accelerator"]
    step = max(1, block_bytes // (4 * rows_RO.shape[1]))
    return (slice(start, start + step) for start in range(0, rows_RO.shape[0], step))


def _activate(both_RO: Tensor, weight_R: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(weighted activation, rounded once to the dtype of `both_RO`; the activation before its weight, if `keep` and if
    the backward pass does not have it for nothing)."""
    if (kernels := _kernels(both_RO, weight_R)) is not None:
        return kernels.activate(both_RO, weight_R), None
    weighted_RF = both_RO.new_empty(both_RO.shape[0], both_RO.shape[1] // 2)
    act_RF = torch.empty_like(weighted_RF) if keep and weight_R is not None else None
    for block in _blocks(both_RO):
        gate, up = _wide(both_RO[block]).chunk(2, dim=-1)
        act = F.silu(gate).mul_(up)
        if act_RF is not None:
            act_RF[block] = act
        if weight_R is None:
            weighted_RF[block] = act
        else:
            torch.mul(act, weight_R[block].unsqueeze(1), out=weighted_RF[block])
    return weighted_RF, act_RF if weight_R is not None or not keep else weighted_RF


def _activate_backward(
    both_RO: Tensor, act_RF: Tensor | None, weight_R: Tensor | None, grad_RF: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(weighted activation, gradient of `both_RO`, gradient of `weight_R`) from the weighted activation's gradient."""
    if act_RF is None and (kernels := _kernels(both_RO, weight_R)) is not None:
        return kernels.activate_backward(both_RO, weight_R, grad_RF)
    weighted_RF, grad_both_RO = torch.empty_like(grad_RF), torch.empty_like(both_RO)
    grad_weight_R = None if weight_R is None else torch.empty_like(weight_R)
    for block in _blocks(both_RO):
        gate, up = _wide(both_RO[block]).chunk(2, dim=-1)
        grad_gate, grad_up = grad_both_RO[block].chunk(2, dim=-1)
        grad, silu = _wide(grad_RF[block]), F.silu(gate)
        act = silu * up if act_RF is None else _wide(act_RF[block])
        if grad_weight_R is None or weight_R is None:
            weighted_RF[block] = act
        else:
            grad_weight_R[block] = torch.linalg.vecdot(grad, act)
            weight = weight_R[block].unsqueeze(1)
            torch.mul(act, weight, out=weighted_RF[block])
            grad = grad * weight
        torch.mul(grad, silu, out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    return weighted_RF, grad_both_RO, grad_weight_R


def _kernels(both_RO: Tensor, weight_R: Tensor | None) -> ModuleType | None:
    """The Triton kernels, for rows on a GPU that they take; Triton comes with torch's builds for CUDA."""
    if not both_RO.is_cuda or (kernels := _triton()) is None or not kernels.takes(both_RO, weight_R):
        return None
    return kernels


@cache
def _triton() -> ModuleType | None:
    """Triton builds what launches its kernels with a C compiler, which not every image has."""
    compiler = os.environ.get("CC") or which("gcc") or which("clang")
    return import_module("ds_moe.moe.backends.swiglu_triton") if compiler and find_spec("triton") else None


def _wide(values: Tensor) -> Tensor:
    """Convert to fp32 (float64 stays), so that the arithmetic between two products is rounded only once."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
