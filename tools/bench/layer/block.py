"""What is measured: shapes, inputs that a router sends where a routing says, weights, and blocks made of them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

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
    device: str
    dtype: torch.dtype
    tolerance: float  # largest difference to the eager layer, relative to the largest value of its tensor
    shapes: dict[str, Shape]
    growth: dict[str, list[Shape]]  # axis -> shapes in which only it grows


def sweeps(base: Shape, **axes: list[int]) -> dict[str, list[Shape]]:
    return {axis: [base._replace(**{axis: size}) for size in sizes] for axis, sizes in axes.items()}


POWERS = [2**power for power in range(17)]
SMOKE_SHAPES = {"tiny": Shape(64, 64, 48, 4, 2)}
CPU_SHAPES = {"A": Shape(1024, 512, 512, 8, 2), "B": Shape(2048, 512, 256, 64, 2), "C": Shape(4096, 1024, 512, 32, 2)}
H100_SHAPES = {
    "qwen3-vl-30b": Shape(32768, 2048, 768, 128, 8),
    "qwen3-vl-235b": Shape(16384, 4096, 1536, 128, 8),
    "olmoe": Shape(32768, 2048, 1024, 64, 8),
}
# K = 1 is left out: a renormalised weight is 1 then, and the router's gradient nothing but rounding.
SMOKE_GROWTH = sweeps(Shape(64, 64, 48, 8, 2), T=[32, 64, 128], E=[4, 8, 16], K=[2, 4])
CPU_GROWTH = sweeps(Shape(8192, 256, 128, 32, 2), T=POWERS[10:17], E=POWERS[3:9], K=POWERS[1:5])
H100_GROWTH = sweeps(Shape(16384, 2048, 768, 128, 8), T=POWERS[10:17], E=POWERS[4:9], K=POWERS[1:5])
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


class Unavailable(Exception):
    """Why a contender cannot run here."""


class Weights(NamedTuple):
    """As transformers keeps them; O = 2F, gate rows first. The router's rows are orthonormal, for `routed_input`."""

    router_ED: nn.Parameter
    gate_up_EOD: nn.Parameter
    down_EDF: nn.Parameter


class Case(NamedTuple):
    shape: Shape
    weights: Weights
    fullest: int  # rows of the expert that has most


class Block(NamedTuple):
    run: Callable[[Tensor], Tensor]  # (1, T, D) -> (1, T, D)
    parameters: list[Tensor]
    as_weights: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list  # gradients of `parameters` -> of `Weights`
    note: str = ""  # what a reader of its figures must know


def draw_weights(shape: Shape, suite: Suite) -> Weights:
    """Every call the same on one kind of device."""
    generator = torch.Generator(suite.device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.empty(size, device=suite.device, dtype=suite.dtype).normal_(0, 0.02, generator=generator)

    router_DE = torch.linalg.qr(torch.randn(shape.D, shape.E, generator=torch.Generator().manual_seed(0))).Q
    router_ED = router_DE.T.contiguous().to(suite.device, suite.dtype)
    matrices = router_ED, normal(shape.E, 2 * shape.F, shape.D), normal(shape.E, shape.D, shape.F)
    return Weights(*(nn.Parameter(matrix) for matrix in matrices))


class Expert(nn.Module):
    """SwiGLU, gate and up in one product."""

    def __init__(self, D: int, F: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(D, 2 * F, bias=False)
        self.down = nn.Linear(F, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def hf_model(case: Case, implementation: str) -> nn.Module:
    """A Qwen3-MoE of one layer whose MoE block holds the weights; nothing else of it is in memory."""
    shape = case.shape
    config = transformers.Qwen3MoeConfig(
        **{"vocab_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8},
        **{"hidden_size": shape.D, "moe_intermediate_size": shape.F, "num_experts": shape.E},
        **{"num_experts_per_tok": shape.K, "norm_topk_prob": True, "experts_implementation": implementation},
    )
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config).train()
    block = model.model.layers[0].mlp
    block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj = case.weights
    return model


def need_cuda(tensor: Tensor) -> None:
    """Triton's kernels do run on a CPU, interpreted, but their time says nothing."""
    if tensor.device.type != "cuda":
        raise Unavailable("its Triton kernels need CUDA; interpreted on a CPU they are no timing")
