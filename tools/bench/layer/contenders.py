"""One MoE layer as every contender of the benchmark builds it: the same weights, input and routing for all.

The router renormalises the softmax of the K chosen logits, as Qwen3-MoE and Qwen3-VL-MoE do. Contenders in
transformers' layout share the weight tensors; the others copy them once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_moe.config.moe import ExpertsConfig, MoEConfig
from ds_moe.models.convert import convert
from ds_moe.moe.backends import BACKENDS, liger, megablocks_ops
from tools.bench.layer.block import Block, Case, Expert, Shape, Suite, Unavailable, hf_model, need_cuda

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


def autoep(case: Case, **settings: Any) -> Block:
    """DeepSpeed's expert-parallel layer on one rank. It needs no process group there."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.module_inject.auto_ep_presets.base import AutoEPConfig, MoELayerSpec

    device = case.weights.router_ED.device.type
    if settings and device != "cuda":
        raise Unavailable("its kernels are CUDA's")
    shape = case.shape
    spec = MoELayerSpec(
        **{"moe_module_name": "mlp", "model_family": "qwen3_moe", "router_name": "gate", "experts_name": "experts"},
        **{"expert_storage": "fused_3d", "expert_w1_name": "gate_up_proj", "expert_w2_name": "down_proj"},
        **{"expert_w3_name": None, "num_experts": shape.E, "top_k": shape.K, "hidden_size": shape.D},
        **{"ffn_hidden_size": shape.F, "score_func": "softmax", "score_apply": "post", "route_norm": True},
        **{"gate_bias": False, "return_router_logits": False, "router_logits_capture_target": "none"},
        **{"router_logits_capture_index": None, "router_logits_capture_layer_name": None},
        **{"has_shared_experts": False, "shared_experts_name": ""},
    )
    source, config = hf_model(case, "eager").model.layers[0].mlp, AutoEPConfig(enabled=True, **settings)
    layer = AutoEPMoELayer(spec, source, ep_size=1, ep_rank=0, config=config).train()
    parameters = [layer.router.gate.weight, layer.experts.w1, layer.experts.w3, layer.experts.w2]
    return Block(layer, parameters, lambda grads: (grads[0], torch.cat(grads[1:3], dim=1), grads[3]))


def deepspeed_moe(case: Case) -> Block:
    """DeepSpeed's first MoE layer, without token drops: it pads every expert to the fullest one's rows.

    With `top2_2nd_expert_sampling` off and K > 1 its gate weighs as transformers' does, so that outputs are equal.
    """
    from deepspeed.moe.layer import MoE

    shape, weights = case.shape, case.weights
    if shape.K < 2:
        raise Unavailable("with one expert a token its gate does not renormalise: another function")
    rows, values = shape.E * case.fullest, 2 * (3 * shape.D + 4 * shape.F)
    wanted, free = rows * values * weights.router_ED.element_size(), free_bytes(weights.router_ED.device)
    if wanted > free:
        raise Unavailable(f"padding to {rows:,} rows takes about {wanted / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    with torch.device("meta"):
        settings = {"drop_tokens": False, "top2_2nd_expert_sampling": False}
        moe = MoE(shape.D, Expert(shape.D, shape.F), shape.E, k=shape.K, **settings).train()
    moe.deepspeed_moe.gate.wg.weight = weights.router_ED
    experts: list[Any] = list(moe.deepspeed_moe.experts.deepspeed_experts)
    for expert, gate_up_OD, down_DF in zip(experts, weights.gate_up_EOD, weights.down_EDF, strict=True):
        expert.gate_up.weight, expert.down.weight = (nn.Parameter(view.detach()) for view in (gate_up_OD, down_DF))
    gate_ups, downs = ([getattr(expert, name).weight for expert in experts] for name in ("gate_up", "down"))

    def as_weights(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return grads[0], torch.stack(grads[1 : shape.E + 1]), torch.stack(grads[shape.E + 1 :])

    return Block(lambda x: moe(x)[0], [weights.router_ED, *gate_ups, *downs], as_weights)


def free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def megablocks_dmoe(case: Case) -> Block:
    """megablocks' dropless layer; of its two kinds the grouped one, as the other refuses today's Triton.

    Its parts that are not compiled are ds_moe's stand-ins, made of torch's ops: the note says so.
    """
    need_cuda(case.weights.router_ED)
    if case.weights.router_ED.dtype != torch.bfloat16 and megablocks_ops.compiled("grouped_gemm"):
        raise Unavailable(f"grouped_gemm multiplies bfloat16 only, not {case.weights.router_ED.dtype}")
    shape, (router_ED, gate_up_EOD, down_EDF) = case.shape, case.weights
    megablocks_ops.load_megablocks(router_ED.device.type)
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    arguments = Arguments(
        **{"hidden_size": shape.D, "ffn_hidden_size": shape.F, "moe_num_experts": shape.E, "moe_top_k": shape.K},
        **{"bias": False, "return_bias": False, "activation_fn": F.silu, "mlp_type": "glu", "mlp_impl": "grouped"},
        **{"moe_normalize_expert_weights": 1, "moe_loss_weight": 0},  # divided by their sum; no aux loss piles up
        **{"fp16": False, "bf16": router_ED.dtype == torch.bfloat16, "device": router_ED.device},
    )
    layer = dMoE(arguments).train()
    glu = layer.experts.mlp
    with torch.no_grad():
        layer.router.layer.weight.copy_(router_ED)
        for stored, weight_EFD in zip((glu.w1, glu.v1), gate_up_EOD.chunk(2, dim=1), strict=True):
            stored.copy_(weight_EFD.reshape(-1, shape.D))
        glu.w2.copy_(down_EDF.transpose(1, 2).reshape(-1, shape.D))

    def as_weights(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        gate_EFD, up_EFD, down_EFD = (grad.view(shape.E, shape.F, shape.D) for grad in grads[1:])
        return grads[0], torch.cat((gate_EFD, up_EFD), dim=1), down_EFD.transpose(1, 2)

    parameters = [layer.router.layer.weight, glu.w1, glu.v1, glu.w2]
    return Block(layer, parameters, as_weights, f"with {megablocks_ops.active()}")


def liger_experts(case: Case) -> Block:
    """transformers' router with the experts that liger-kernel patches in, `LigerFusedMoEFunction`."""
    need_cuda(case.weights.router_ED)
    liger.load_liger(case.weights.router_ED.device.type)  # raises where it is missing
    from liger_kernel.transformers.swiglu import LigerExperts

    model = hf_model(case, "eager")
    block = model.model.layers[0].mlp
    with torch.device("meta"):
        block.experts = LigerExperts(model.config)
    block.experts.gate_up_proj, block.experts.down_proj = case.weights[1:]
    return Block(block, list(case.weights))
