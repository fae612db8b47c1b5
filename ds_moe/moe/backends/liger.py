"""liger-kernel's fused experts: grouped products, activation and combine weight in its own Triton kernels."""

import importlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import version

import torch
from torch import Tensor

from ds_moe.errors import UserError
from ds_moe.moe.backends.grouped_mm import GroupedMM
from ds_moe.moe.backends.optional import interpreted, keep_one_config, obstacle
from ds_moe.moe.backends.swiglu import Recompute

INSTALL = "pip install --no-deps liger-kernel==0.8.5"


class Liger(GroupedMM):
    """`LigerFusedMoEFunction` on the rows a rank received, as if each were a token with one expert.

    liger-kernel sums the gradient of the combine weights in the rows' dtype, in an order that changes from run to run,
    and computes fp32 products as TF32 on CUDA. The products of LoRA updates are torch's.
    """

    @classmethod
    def obstacle(cls, device: str) -> str | None:
        return obstacle({"liger_kernel": INSTALL}, device)

    @classmethod
    def made_of(cls) -> str:
        return f"liger-kernel {version('liger-kernel')}"

    def swiglu(
        self,
        rows_RD: Tensor,
        gate_up_eOD: Tensor,
        down_eDF: Tensor,
        counts_e: Tensor,
        weight_R: Tensor | None,
        recompute: Recompute,
    ) -> Tensor:
        """As in `Backend`, except that `recompute` is ignored: liger-kernel always recomputes the activation.

        Raises:
            UserError: the package cannot be used here, or not for bfloat16.
        """
        rows = rows_RD.shape[0]
        if rows == 0 or rows_RD.dtype == torch.float64:  # no rows: nothing to launch; float64: its kernels sum in fp32
            return super().swiglu(rows_RD, gate_up_eOD, down_eDF, counts_e, weight_R, recompute)
        if rows_RD.dtype == torch.bfloat16 and not rows_RD.is_cuda:
            # Triton 3.9's interpreter multiplies the bits of bfloat16 as if they were integers, and says nothing.
            raise UserError("moe.experts.backend=liger: on a CPU it cannot compute in bfloat16; choose float32")
        experts_e = torch.arange(counts_e.numel(), dtype=torch.int32, device=rows_RD.device)
        expert_R = experts_e.repeat_interleave(counts_e, output_size=rows)
        if weight_R is None:
            weight_R = torch.ones(rows, device=rows_RD.device)
        fused = load_liger(rows_RD.device.type)
        return fused(rows_RD, gate_up_eOD, down_eDF, expert_R.unsqueeze(1), weight_R.unsqueeze(1))


@cache
def load_liger(device: str) -> Callable[..., Tensor]:
    """liger-kernel's fused expert function. Raises `UserError` where the package cannot be used."""
    if reason := Liger.obstacle(device):
        raise UserError(f"moe.experts.backend=liger: {reason}")
    fused_moe = importlib.import_module("liger_kernel.ops.fused_moe")
    if interpreted():
        keep_one_config(fused_moe)
    return fused_moe.LigerFusedMoEFunction.apply
