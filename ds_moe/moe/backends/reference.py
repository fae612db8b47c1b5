"""The slow backend that the fast ones are compared with: a loop over experts, any dtype, torch's own gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_moe.moe.backends.base import Backend
from ds_moe.moe.backends.swiglu import Recompute


class Reference(Backend):
    """Multiplies in loops and leaves gradients to autograd. It moves rows as every kind does, so it cannot judge that
    part: tests compare the whole layer with transformers'."""

    def product(self, rows_RI: Tensor, weight_eIO: Tensor, counts_e: Tensor) -> Tensor:
        chunks = rows_RI.split(counts_e.tolist())
        return torch.cat([rows @ weight for rows, weight in zip(chunks, weight_eIO.unbind(0), strict=True)])

    def outer(self, left_RO: Tensor, right_RI: Tensor, counts_e: Tensor) -> Tensor:
        chunks = zip(left_RO.split(counts_e.tolist()), right_RI.split(counts_e.tolist()), strict=True)
        return torch.stack([left.T @ right for left, right in chunks])

    def multiply(self, rows_RI: Tensor, weight_eOI: Tensor, counts_e: Tensor) -> Tensor:
        """As in `Backend`; the gradient of an expert without rows is zero rather than None."""
        return self.product(rows_RI, weight_eOI.transpose(-2, -1), counts_e)

    def swiglu(
        self,
        rows_RD: Tensor,
        gate_up_eOD: Tensor,
        down_eDF: Tensor,
        counts_e: Tensor,
        weight_R: Tensor | None,
        recompute: Recompute,
    ) -> Tensor:
        """As in `Backend`, except that `recompute` is ignored: autograd decides what is kept."""
        gate_RF, up_RF = self.multiply(rows_RD, gate_up_eOD, counts_e).chunk(2, dim=-1)
        rows_RD = self.multiply(F.silu(gate_RF) * up_RF, down_eDF, counts_e)
        return rows_RD if weight_R is None else (rows_RD * weight_R.unsqueeze(1)).to(rows_RD.dtype)
