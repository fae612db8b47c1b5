"""The experts a rank owns: weights in the layout transformers keeps in memory, arithmetic in a backend."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ds_moe.moe.backends import BACKENDS
from ds_moe.moe.lora import ExpertLoRA


class Experts(nn.Module):
    """SwiGLU experts as two stacked matrices, under transformers' names.

    Args:
        gate_up_proj: (e, 2F, D), gate rows first.
        down_proj: (e, D, F).
        activation: applied to the gate half, e.g. SiLU.
        backend: a key of `BACKENDS`.
        lora: updates of the same experts; None: none.
    """

    def __init__(
        self,
        gate_up_proj: nn.Parameter,
        down_proj: nn.Parameter,
        activation: Callable[[Tensor], Tensor],
        backend: str = "grouped_mm",
        lora: ExpertLoRA | None = None,
    ) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.activation = activation
        self.multiply = BACKENDS[backend]
        self.lora = lora

    def forward(self, rows_RD: Tensor, counts_e: Tensor) -> Tensor:
        """Rows sorted by expert, `counts_e[i]` of them for expert i (int64, zeros allowed) -> (R, D)."""
        gate_RF, up_RF = self._product("gate_up", rows_RD, self.gate_up_proj, counts_e).chunk(2, dim=-1)
        return self._product("down", self.activation(gate_RF) * up_RF, self.down_proj, counts_e)

    def _product(self, part: str, rows_RI: Tensor, weight_eOI: Tensor, counts_e: Tensor) -> Tensor:
        rows_RO = self.multiply(rows_RI, weight_eOI, counts_e)
        if self.lora is not None:
            rows_RO = rows_RO + self.lora(part, rows_RI, counts_e, self.multiply)
        return rows_RO
