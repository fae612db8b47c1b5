"""What the benchmark's contenders are made of: weights, a case to build for, and the block that is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from tools.bench.layer.shapes import Shape, Suite


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
    """A layer that can be measured.

    Attributes:
        run: (1, T, D) -> (1, T, D).
        parameters: what it trains.
        as_weights: gradients of `parameters` -> those of `Weights`.
        note: what a reader of its figures must know.
    """

    run: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    as_weights: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list
    note: str = ""


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
