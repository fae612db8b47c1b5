"""The sizes that are measured, and hidden states that a router sends where a routing says."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUTINGS = ("uniform", "zipf", "one_hot")


class Shape(NamedTuple):
    """T tokens of width D choose K of E SwiGLU experts of width F: T * K rows."""

    T: int
    D: int
    F: int
    E: int
    K: int

    @property
    def flops(self) -> int:
        """Of the experts' products, forward and backward: 3 matrices, 3 products each, 2 operations a weight."""
        return 18 * self.T * self.K * self.D * self.F


class Suite(NamedTuple):
    """Shapes for one kind of device.

    Attributes:
        tolerance: largest difference to the eager layer, relative to the largest value of its tensor.
        growth: axis (`T`, `E`, `K`) -> shapes in which only it grows (with E, K and T stay: as many rows).
    """

    device: str
    dtype: torch.dtype
    tolerance: float
    shapes: dict[str, Shape]
    growth: dict[str, list[Shape]]


def sweeps(base: Shape, tokens: list[int], experts: list[int], top_k: list[int]) -> dict[str, list[Shape]]:
    return {
        "T": [base._replace(T=T) for T in tokens],
        "E": [base._replace(E=E) for E in experts],
        "K": [base._replace(K=K) for K in top_k],
    }


POWERS = [2**power for power in range(17)]
SMOKE_SHAPES = {"tiny": Shape(64, 64, 48, 4, 2)}
CPU_SHAPES = {"A": Shape(1024, 512, 512, 8, 2), "B": Shape(2048, 512, 256, 64, 2), "C": Shape(4096, 1024, 512, 32, 2)}
H100_SHAPES = {
    "qwen3-vl-30b": Shape(32768, 2048, 768, 128, 8),
    "qwen3-vl-235b": Shape(16384, 4096, 1536, 128, 8),
    "olmoe": Shape(32768, 2048, 1024, 64, 8),
}
# K = 1 is left out: a renormalised weight is 1 then, and the router's gradient nothing but rounding.
SMOKE_GROWTH = sweeps(Shape(64, 64, 48, 8, 2), [32, 64, 128], [4, 8, 16], [2, 4])
CPU_GROWTH = sweeps(Shape(8192, 256, 128, 32, 2), POWERS[10:17], POWERS[3:9], POWERS[1:5])
H100_GROWTH = sweeps(Shape(16384, 2048, 768, 128, 8), POWERS[10:17], POWERS[4:9], POWERS[1:5])
SUITES = {
    "smoke": Suite("cpu", torch.float32, 1e-4, SMOKE_SHAPES, SMOKE_GROWTH),
    "cpu": Suite("cpu", torch.float32, 1e-4, CPU_SHAPES, CPU_GROWTH),
    # bf16: the eager layer rounds each of the K terms of a token, others their sum.
    "h100": Suite("cuda", torch.bfloat16, 3e-2, H100_SHAPES, H100_GROWTH),
}


def routed_input(shape: Shape, router_ED: Tensor, routing: str) -> Tensor:
    """(1, T, D) hidden states that a router of orthonormal rows sends where `routing` says, on the router's device.

    A token's experts are K draws without replacement: the K largest of log-probabilities plus Gumbel noise. Their
    logits lie between 1 and 2, all others between -2 and -1, so that no rounding of a contender's changes a choice.
    Routing: uniform; zipf (expert i is drawn in proportion to 1 / (i + 1)); one_hot (all tokens choose the same).
    """
    generator = torch.Generator().manual_seed(1)
    rank_E = torch.arange(shape.E)
    zipf_E, one_hot_E = 1 / (rank_E + 1), torch.where(rank_E < shape.K, 1.0, 1e-30)
    chance_E = {"uniform": torch.ones(shape.E), "zipf": zipf_E, "one_hot": one_hot_E}[routing]
    drawn_TE = chance_E.log() - torch.empty(shape.T, shape.E).exponential_(generator=generator).log()
    wanted_TE = -1 - torch.rand(shape.T, shape.E, generator=generator)
    chosen_TK = drawn_TE.topk(shape.K).indices
    wanted_TE.scatter_(1, chosen_TK, 1 + torch.rand(shape.T, shape.K, generator=generator))
    x_TD = torch.randn(shape.T, shape.D, generator=generator)
    rows_ED = router_ED.detach().cpu().float()
    x_TD += (wanted_TE - x_TD @ rows_ED.T) @ rows_ED
    return x_TD.unsqueeze(0).to(router_ED.device, router_ED.dtype).requires_grad_()
