"""SiLU-gated experts as one autograd function: what it saves, and its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Recompute = Literal["none", "act", "all"]
# Bytes of a block of rows in fp32. On a CPU: what an elementwise pass leaves in the cache for the next one; on an
# accelerator: enough to fill it, and few enough for temporary copies.
BLOCK_BYTES = {"cpu": 2**21, "accelerator": 2**28}


class Products(Protocol):
    """The two kernels of a `Backend` that this needs."""

    def product(self, rows_RI: Tensor, weight_eIO: Tensor, counts_e: Tensor) -> Tensor: ...

    def outer(self, left_RO: Tensor, right_RI: Tensor, counts_e: Tensor) -> Tensor: ...


def swiglu(
    products: Products,
    rows_RD: Tensor,
    gate_up_eOD: Tensor,
    down_eDF: Tensor,
    counts_e: Tensor,
    weight_R: Tensor | None = None,
    recompute: Recompute = "act",
) -> Tensor:
    """`(SiLU(x Wg.T) * (x Wu.T) * weight) Wd.T` for rows grouped by expert: (R, D).

    The combine weight multiplies the narrow activation instead of the wide output (the product is linear): a pass
    over F columns instead of D, and the gradient of the weight needs no saved output.

    Args:
        rows_RD: `counts_e[i]` rows of expert i after those of expert i - 1; zeros are allowed.
        gate_up_eOD: Wg above Wu, O = 2F.
        down_eDF: Wd.
        weight_R: fp32 (or as wide as the rows); None: 1.
        recompute: what backward computes again instead of keeping it, beside the rows: `none`: it keeps the products
            (R, 2F) and the activation (R, F); `act`: the products; `all`: nothing, one product of three is repeated.
    """
    return _SwiGLU.apply(products, rows_RD, gate_up_eOD, down_eDF, counts_e, weight_R, recompute)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        products: Products,
        rows_RD: Tensor,
        gate_up_eOD: Tensor,
        down_eDF: Tensor,
        counts_e: Tensor,
        weight_R: Tensor | None,
        recompute: Recompute,
    ) -> Tensor:
        both_RO = products.product(rows_RD, gate_up_eOD.transpose(-2, -1), counts_e)
        weighted_RF, act_RF = _activate(both_RO, weight_R, keep=recompute == "none")
        ctx.products = products
        ctx.save_for_backward(
            rows_RD, gate_up_eOD, down_eDF, counts_e, weight_R, None if recompute == "all" else both_RO, act_RF
        )
        return products.product(weighted_RF, down_eDF.transpose(-2, -1), counts_e)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, gate_up_eOD, down_eDF, counts_e, weight_R, both_RO, act_RF = ctx.saved_tensors
        products: Products = ctx.products
        _, rows_wanted, gate_up_wanted, down_wanted, *_ = ctx.needs_input_grad
        grad_RD = grads[0].contiguous()  # the gradient of a sum is expanded, stride 0
        if both_RO is None:
            both_RO = products.product(rows_RD, gate_up_eOD.transpose(-2, -1), counts_e)
        grad_RF = products.product(grad_RD, down_eDF, counts_e)
        weighted_RF, grad_both_RO, grad_weight_R = _activate_backward(both_RO, act_RF, weight_R, grad_RF)
        del grad_RF
        grad_down_eDF = products.outer(grad_RD, weighted_RF, counts_e) if down_wanted else None
        grad_gate_up_eOD = products.outer(grad_both_RO, rows_RD, counts_e) if gate_up_wanted else None
        grad_rows_RD = products.product(grad_both_RO, gate_up_eOD, counts_e) if rows_wanted else None
        return None, grad_rows_RD, grad_gate_up_eOD, grad_down_eDF, None, grad_weight_R, None


def _blocks(rows_RO: Tensor) -> Iterator[slice]:
    """Rows to pass over together."""
    block_bytes = BLOCK_BYTES["cpu" if rows_RO.device.type == "cpu" else "accelerator"]
    step = max(1, block_bytes // (4 * rows_RO.shape[1]))
    return (slice(start, start + step) for start in range(0, rows_RO.shape[0], step))


def _activate(both_RO: Tensor, weight_R: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(the weighted activation, in the dtype of `both_RO` and rounded once; the activation before, if wanted)."""
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


def _wide(values: Tensor) -> Tensor:
    """fp32 (float64 stays): the elementwise arithmetic between two products is rounded once."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
