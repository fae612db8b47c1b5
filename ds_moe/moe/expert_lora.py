"""Low-rank updates (LoRA) of the experts that a rank owns, sharded and multiplied by expert as the experts are."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]  # `Backend.multiply`
ALL = slice(None)


class ExpertLoRA(nn.Module):
    """`W_e x + scaling * B_e (A_e x)` for both matrices of every expert (Hu et al. 2021, one update an expert).

    Parameters, with r the rank: gate_up_A (e, r, D), gate_up_B (e, 2F, r), down_A (e, r, F), down_B (e, D, r). As in
    PEFT, A is drawn from the uniform distribution of `nn.Linear` and B is 0, so that the update starts at zero.

    Args:
        gate_up_proj, down_proj: the weights (E, 2F, D) and (E, D, F) to update. Only their shapes, dtype and device are
            read. Give all E experts, then `keep` those of this rank: an expert's A then is the same for any EP size.
        rank: r.
        scaling: factor of the update.
        dropout: probability of dropping an input of A, in training.
        seed: of the random numbers for A.
    """

    def __init__(
        self, gate_up_proj: Tensor, down_proj: Tensor, rank: int, scaling: float, dropout: float, seed: int
    ) -> None:
        super().__init__()
        self.scaling, self.dropout = scaling, dropout
        generator = torch.Generator().manual_seed(seed)
        for name, weight_eOI in (("gate_up", gate_up_proj), ("down", down_proj)):
            experts, outputs, inputs = weight_eOI.shape
            kind = {"dtype": weight_eOI.dtype, "device": weight_eOI.device}
            a_erI = torch.empty(experts, rank, inputs)
            a_erI.uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
            self.register_parameter(f"{name}_A", nn.Parameter(a_erI.to(**kind)))
            self.register_parameter(f"{name}_B", nn.Parameter(torch.zeros(experts, outputs, rank, **kind)))

    def keep(self, owned: slice) -> None:
        """Drop all experts but those of `owned`."""
        for name, parameter in list(self.named_parameters()):
            self.register_parameter(name, nn.Parameter(parameter.detach()[owned].clone()))

    def forward(self, part: str, rows_RI: Tensor, counts_e: Tensor, multiply: Multiply, experts: slice = ALL) -> Tensor:
        """The update of one matrix, `part` gate_up or down, of these experts, for rows sorted by expert: (R, O)."""
        rows_RI = F.dropout(rows_RI, self.dropout, self.training)
        a_erI, b_eOr = (getattr(self, f"{part}_{letter}") for letter in "AB")
        if experts != ALL:
            a_erI, b_eOr = a_erI[experts], b_eOr[experts]
        return multiply(multiply(rows_RI, a_erI, counts_e), b_eOr, counts_e) * self.scaling
