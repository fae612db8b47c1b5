"""The rivals that ds_moe's environment may hold: two layers of DeepSpeed, one of megablocks, the experts of liger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_moe.moe.backends import liger, megablocks_ops
from tools.bench.layer.block import Block, Case, Expert, Unavailable, hf_model, need_cuda


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
    experts = layer.experts
    return Block(
        layer,
        [layer.router.gate.weight, experts.w1, experts.w3, experts.w2],
        lambda grads: (grads[0], torch.cat(grads[1:3], dim=1), grads[3]),
    )


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
    return Block(
        lambda x: moe(x)[0],
        [
            weights.router_ED,
            *(expert.gate_up.weight for expert in experts),
            *(expert.down.weight for expert in experts),
        ],
        lambda grads: (grads[0], torch.stack(grads[1 : shape.E + 1]), torch.stack(grads[shape.E + 1 :])),
    )


def free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def megablocks_dmoe(case: Case) -> Block:
    """megablocks' dropless layer; of its two kinds the grouped one, as the other refuses today's Triton."""
    need_cuda(case.weights.router_ED)
    if case.weights.router_ED.dtype != torch.bfloat16 and megablocks_ops.compiled("grouped_gemm"):
        raise Unavailable(f"grouped_gemm multiplies bfloat16 only, not {case.weights.router_ED.dtype}")
    return dmoe(case)


def dmoe(case: Case) -> Block:
    """Its parts that are not compiled are ds_moe's stand-ins, made of torch's ops: the note says so."""
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
    return patched(case)


def patched(case: Case) -> Block:
    liger.load_liger(case.weights.router_ED.device.type)  # raises where it is missing
    from liger_kernel.transformers.swiglu import LigerExperts

    model = hf_model(case, "eager")
    block = model.model.layers[0].mlp
    with torch.device("meta"):
        block.experts = LigerExperts(model.config)
    block.experts.gate_up_proj, block.experts.down_proj = case.weights[1:]
    return Block(block, list(case.weights))
