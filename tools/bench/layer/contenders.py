"""One MoE layer as every contender of the benchmark builds it: the same weights, input and routing for all.

The router renormalises the softmax of the K chosen logits, as Qwen3-MoE and Qwen3-VL-MoE do. Contenders in
transformers' layout share the weight tensors; the others copy them once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_moe.config.moe import ExpertsConfig, MoEConfig
from ds_moe.models.convert import convert
from ds_moe.moe.backends import BACKENDS
from tools.bench.layer.block import Block, Case, Expert, hf_model, need_cuda
from tools.bench.layer.rivals import autoep, deepspeed_moe, liger_experts, megablocks_dmoe
from tools.bench.layer.shapes import Shape, Suite

DEFAULT, EAGER, RIVAL = "ds_moe (default)", "transformers eager", "transformers grouped_mm"
TRITON = ("megablocks", "liger")  # backends


def contenders() -> dict[str, Callable[[Case], Block]]:
    """How each is built, the default and its rival first.

    Building or running one that cannot run here raises `Unavailable`, or ds_moe's `UserError` for a missing package.
    """
    ours = {f"ds_moe {backend}": {"backend": backend} for backend in BACKENDS}
    ours |= {f"ds_moe recompute {kept}": {"recompute": kept} for kept in ("none", "all")}
    return {
        DEFAULT: ds_moe,
        RIVAL: lambda case: transformers_layer(case, "grouped_mm"),
        **{name: lambda case, settings=settings: ds_moe(case, **settings) for name, settings in ours.items()},
        EAGER: lambda case: transformers_layer(case, "eager"),
        "DeepSpeed AutoEP": autoep,
        "DeepSpeed AutoEP fused": lambda case: autoep(case, combine_impl="fused_weighted_sum", gate_up_impl="fused"),
        "DeepSpeed MoE": deepspeed_moe,
        "megablocks dMoE": megablocks_dmoe,
        "liger LigerExperts": liger_experts,
    }


def dense(shape: Shape, suite: Suite) -> tuple[Block, Tensor]:
    """A roofline: one dense SwiGLU and as many rows as the experts get together, (T * K, D)."""
    expert = Expert(shape.D, shape.F).to(suite.device, suite.dtype)
    rows_RD = torch.randn(shape.T * shape.K, shape.D).to(suite.device, suite.dtype).requires_grad_()
    return Block(expert, list(expert.parameters())), rows_RD


def square(suite: Suite) -> tuple[Block, Tensor, int]:
    """The other roofline: a product of large square matrices and its two backward ones; the last is their FLOPs."""
    size = 8192 if suite.device == "cuda" else 1024
    x, weight = (torch.randn(size, size, device=suite.device, dtype=suite.dtype).requires_grad_() for _ in range(2))
    return Block(lambda x: x @ weight, [weight]), x, 6 * size**3


def transformers_layer(case: Case, implementation: str) -> Block:
    return Block(hf_model(case, implementation).model.layers[0].mlp, list(case.weights))


def ds_moe(case: Case, **settings: Any) -> Block:
    """Ours: transformers' block, converted; `settings` of `moe.experts`."""
    if settings.get("backend") in TRITON:
        need_cuda(case.weights.router_ED)
    model = hf_model(case, "eager")
    convert(model, MoEConfig(experts=ExpertsConfig(**settings)))
    layer = model.model.layers[0].mlp.to(case.weights.router_ED.device)  # its buffers
    return Block(layer, list(case.weights))
