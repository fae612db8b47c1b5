"""megablocks: its sort, and its Triton kernels that move rows; with grouped_gemm, its CUDA product of bf16."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ds_moe.moe.backends.base import Order
from ds_moe.moe.backends.grouped_mm import GroupedMM
from ds_moe.moe.backends.megablocks_ops import active, compiled, importable, load

ON_HOST = WeakTensorKeyDictionary()  # counts -> a copy on the host


class Megablocks(GroupedMM):
    """What the package's kernels do not take (float64, no rows, 2**31 values or more) goes through torch, as does the
    sum over lists that give tokens different numbers of experts (padding, capacity, dropout, expert choice)."""

    @classmethod
    def obstacle(cls, device: str) -> str | None:
        return importable(device)

    @classmethod
    def made_of(cls) -> str:
        return f"megablocks {version('megablocks')} with {active()}"

    def sort(self, expert_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        if expert_N.numel() == 0:
            return super().sort(expert_N, num_experts)
        ops = load(expert_N.device.type).ops
        keys_N = expert_N.to(torch.int32)
        _, order_N = ops.sort(keys_N, max(1, (num_experts - 1).bit_length()))
        return order_N.to(torch.int64), ops.histogram(keys_N, num_experts).to(torch.int64)

    def spread(self, x_TD: Tensor, order: Order) -> Tensor:
        """The kernel behind `megablocks.ops.gather`, which itself would want `top_k` rows of every token."""
        rows_ND = x_TD.new_empty(order.token_N.numel(), x_TD.shape[1])
        if not _moves(rows_ND):
            return super().spread(x_TD, order)
        one_bin_N = _one_bin(rows_ND)
        load(x_TD.device.type).backend.kernels._padded_copy[(rows_ND.shape[0],)](
            *(x_TD.contiguous(), rows_ND, order.token_N, one_bin_N, None, one_bin_N[:1], one_bin_N[:1]),
            **{"NUM_COLUMNS": x_TD.shape[1], "A_TO_B": True, "TOP_K": 1, "SCALE": False},
        )
        return rows_ND

    def add_up(self, rows_ND: Tensor, order: Order) -> Tensor:
        """Rows beside each other by token, then torch's sum: in fp32 and rounded once, for bf16 and fp16 too."""
        if order.top_k is None or not _moves(rows_ND):
            return super().add_up(rows_ND, order)
        kernels, one_bin_N = load(rows_ND.device.type).backend.kernels, _one_bin(rows_ND)
        return kernels.scatter(rows_ND.contiguous(), order.order_N, one_bin_N, None, one_bin_N[:1], top_k=order.top_k)

    def product(self, rows_RI: Tensor, weight_eIO: Tensor, counts_e: Tensor) -> Tensor:
        gmm = grouped_gemm(rows_RI)
        if gmm is None:
            return super().product(rows_RI, weight_eIO, counts_e)
        transposed = not weight_eIO.is_contiguous()
        weight = weight_eIO.transpose(-2, -1).contiguous() if transposed else weight_eIO
        return gmm(rows_RI.contiguous(), weight, _on_host(counts_e), trans_b=transposed)

    def outer(self, left_RO: Tensor, right_RI: Tensor, counts_e: Tensor) -> Tensor:
        gmm = grouped_gemm(left_RO)
        if gmm is None:
            return super().outer(left_RO, right_RI, counts_e)
        # Zeros: a product over no rows may leave its place as it is.
        out_eOI = left_RO.new_zeros(counts_e.numel(), left_RO.shape[1], right_RI.shape[1])
        return gmm(left_RO.contiguous(), right_RI.contiguous(), _on_host(counts_e), trans_a=True, c=out_eOI)


def _moves(rows_ND: Tensor) -> bool:
    """Whether the kernels take so many values (their offsets in the sorted rows are int32) of this dtype (by fp32)."""
    return 0 < rows_ND.numel() < 2**31 and rows_ND.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _one_bin(rows_ND: Tensor) -> Tensor:
    """The bin of every row. Bins matter where they are padded; here the sorted rows are one run, so one bin will do."""
    return torch.zeros(rows_ND.shape[0], dtype=torch.int32, device=rows_ND.device)


def grouped_gemm(rows: Tensor) -> Callable[..., Tensor] | None:
    """The compiled product where it can be used: bf16 on CUDA, and not without rows."""
    if rows.dtype != torch.bfloat16 or not rows.is_cuda or rows.shape[0] == 0:
        return None
    package = compiled("grouped_gemm")
    return None if package is None else package.backend.gmm


def _on_host(counts_e: Tensor) -> Tensor:
    """What grouped_gemm wants: int64 on the host. Copied once, as each copy waits for the device."""
    if counts_e not in ON_HOST:
        ON_HOST[counts_e] = counts_e.to("cpu", torch.int64, copy=True)
    return ON_HOST[counts_e]
