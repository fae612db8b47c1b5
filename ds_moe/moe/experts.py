"""The experts a rank owns: weights in the layout that transformers keeps in memory, multiplied by a backend."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ds_moe.moe.backends import Backend, Recompute, backend_for
from ds_moe.moe.expert_lora import ExpertLoRA

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}  # of the gate's rows


class Experts(nn.Module):
    """Gated experts (SwiGLU) as two stacked matrices, under transformers' names.

    Args:
        gate_up_proj: (e, 2F, D), gate rows first.
        down_proj: (e, D, F).
        backend: a kind of kernels, see `backends`.
        lora: low-rank updates of the same experts, if any.
        recompute: what backward computes again instead of keeping it, see `backends.swiglu`. It has no effect with
            `lora`, with another activation than `silu`, and in the reference backend, where autograd decides.
        activation: a key of `ACTIVATIONS`; only `silu` has fused kernels.
    """

    def __init__(
        self,
        gate_up_proj: nn.Parameter,
        down_proj: nn.Parameter,
        backend: str = "auto",
        lora: ExpertLoRA | None = None,
        recompute: Recompute = "act",
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.backend = backend
        self.lora = lora
        self.recompute: Recompute = recompute
        self.activation = activation

    def forward(self, rows_RD: Tensor, counts_e: Tensor, weight_R: Tensor | None = None) -> Tensor:
        """Outputs (R, D), times the combine weights if given.

        Args:
            rows_RD: sorted by expert, `counts_e[i]` of expert i (int64, zeros allowed).
            weight_R: fp32.
        """
        return self._run(self.gate_up_proj, self.down_proj, slice(None), rows_RD, counts_e, weight_R)

    def split(self, parts: int) -> list[Callable[[Tensor, Tensor, Tensor | None], Tensor]]:
        """`parts` functions like `forward`, each for an equal number of experts.

        In backward, autograd copies the gradients of the parts into one tensor.
        """
        if parts == 1:
            return [self]
        size = self.gate_up_proj.shape[0] // parts
        weights = zip(self.gate_up_proj.split(size), self.down_proj.split(size), strict=True)
        return [partial(self._run, *pair, slice(i * size, (i + 1) * size)) for i, pair in enumerate(weights)]

    def _run(
        self,
        gate_up_eOD: Tensor,
        down_eDF: Tensor,
        experts: slice,
        rows_RD: Tensor,
        counts_e: Tensor,
        weight_R: Tensor | None,
    ) -> Tensor:
        backend = backend_for(self.backend, rows_RD)
        if self.lora is None and self.activation == "silu":
            return backend.swiglu(rows_RD, gate_up_eOD, down_eDF, counts_e, weight_R, self.recompute)
        product = updated_product(backend, self.lora, experts, counts_e)
        return gated(product, ACTIVATIONS[self.activation], gate_up_eOD, down_eDF, rows_RD, weight_R)


Product = Callable[[str, Tensor, Tensor], Tensor]  # of a part's rows and its weight, see `ExpertLoRA.forward`


def updated_product(backend: Backend, lora: ExpertLoRA | None, experts: slice, counts_e: Tensor) -> Product:
    """Products of experts, with low-rank updates if there are any: `experts` are those of `lora` that are given."""
    return partial(_product, backend, lora, experts, counts_e)


def gated(
    product: Product,
    activation: Callable[[Tensor], Tensor],
    gate_up_eOD: Tensor,
    down_eDF: Tensor,
    rows_RD: Tensor,
    weight_R: Tensor | None,
) -> Tensor:
    """Outputs (R, D) of gated experts, in operations that autograd sees."""
    gate_RF, up_RF = product("gate_up", rows_RD, gate_up_eOD).chunk(2, dim=-1)
    act_RF = activation(gate_RF) * up_RF
    if weight_R is not None:
        act_RF = (act_RF * weight_R.unsqueeze(1)).to(act_RF.dtype)
    return product("down", act_RF, down_eDF)


def _product(
    backend: Backend,
    lora: ExpertLoRA | None,
    experts: slice,
    counts_e: Tensor,
    part: str,
    rows_RI: Tensor,
    weight_eOI: Tensor,
) -> Tensor:
    """The product of a matrix, plus that of its low-rank update if there is one."""
    rows_RO = backend.multiply(rows_RI, weight_eOI, counts_e)
    return rows_RO if lora is None else rows_RO + lora(part, rows_RI, counts_e, backend.multiply, experts)
