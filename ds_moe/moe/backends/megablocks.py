"""megablocks' sort and its Triton kernels that move rows; with grouped_gemm, also its CUDA product of bf16."""

from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ds_moe.moe.backends.base import Permutation
from ds_moe.moe.backends.grouped_mm import GroupedMM
from ds_moe.moe.backends.megablocks_ops import active, compiled, load_megablocks, megablocks_obstacle

_HOST_COPIES = WeakTensorKeyDictionary()  # counts -> their copy on the host


class Megablocks(GroupedMM):
    """megablocks' kernels, and torch's for what they do not take.

    They do not take float64, empty tensors and 2**31 values or more, nor can they sum over lists that give tokens
    different numbers of experts (padding, capacity, dropout, expert choice).
    """

    @classmethod
    def obstacle(cls, device: str) -> str | None:
        return megablocks_obstacle(device)

    @classmethod
    def made_of(cls) -> str:
        return f"megablocks {version('megablocks')} with {active()}"

    def sort(self, expert_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        if expert_N.numel() == 0:
            return super().sort(expert_N, num_experts)
        ops = load_megablocks(expert_N.device.type).ops
        keys_N = expert_N.to(torch.int32)
        _, order_N = ops.sort(keys_N, max(1, (num_experts - 1).bit_length()))
        return order_N.to(torch.int64), ops.histogram(keys_N, num_experts).to(torch.int64)

    def to_experts(self, x_TD: Tensor, permutation: Permutation) -> Tensor:
        """Launch the kernel behind `megablocks.ops.gather`; `gather` itself wants `top_k` rows of every token."""
        rows_ND = x_TD.new_empty(permutation.token_N.numel(), x_TD.shape[1])
        if not _moves(rows_ND):
            return super().to_experts(x_TD, permutation)
        one_bin_N = _one_bin(rows_ND)
        load_megablocks(x_TD.device.type).backend.kernels._padded_copy[(rows_ND.shape[0],)](
            *(x_TD.contiguous(), rows_ND, permutation.token_N, one_bin_N, None, one_bin_N[:1], one_bin_N[:1]),
            **{"NUM_COLUMNS": x_TD.shape[1], "A_TO_B": True, "TOP_K": 1, "SCALE": False},
        )
        return rows_ND

    def sum_per_token(self, rows_ND: Tensor, permutation: Permutation) -> Tensor:
        """megablocks puts the rows of a token beside each other; torch then sums them in fp32 and rounds once."""
        if permutation.top_k is None or not _moves(rows_ND):
            return super().sum_per_token(rows_ND, permutation)
        kernels, one_bin_N = load_megablocks(rows_ND.device.type).backend.kernels, _one_bin(rows_ND)
        order_N, top_k = permutation.order_N, permutation.top_k
        return kernels.scatter(rows_ND.contiguous(), order_N, one_bin_N, None, one_bin_N[:1], top_k=top_k)

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
        # Start from zeros, because grouped_gemm may not write the product of an expert without rows.
        out_eOI = left_RO.new_zeros(counts_e.numel(), left_RO.shape[1], right_RI.shape[1])
        return gmm(left_RO.contiguous(), right_RI.contiguous(), _on_host(counts_e), trans_a=True, c=out_eOI)


def _moves(rows_ND: Tensor) -> bool:
    """Whether the kernels take these rows: they compute offsets in int32, and values through fp32."""
    return 0 < rows_ND.numel() < 2**31 and rows_ND.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _one_bin(rows_ND: Tensor) -> Tensor:
    """The bin of every row. megablocks pads its bins; the sorted rows are not padded here, so one bin holds all."""
    return torch.zeros(rows_ND.shape[0], dtype=torch.int32, device=rows_ND.device)


def grouped_gemm(rows: Tensor) -> Callable[..., Tensor] | None:
    """grouped_gemm's product if it can take these rows (bf16, on CUDA, at least one), else None."""
    if rows.dtype != torch.bfloat16 or not rows.is_cuda or rows.shape[0] == 0:
        return None
    package = compiled("grouped_gemm")
    return None if package is None else package.backend.gmm


def _on_host(counts_e: Tensor) -> Tensor:
    """grouped_gemm reads int64 counts on the host. Each copy waits for the device, so the counts are copied once."""
    if counts_e not in _HOST_COPIES:
        _HOST_COPIES[counts_e] = counts_e.to("cpu", torch.int64, copy=True)
    return _HOST_COPIES[counts_e]
