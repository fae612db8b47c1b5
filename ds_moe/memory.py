"""Peak memory of one rank, predicted from the configs alone: no weights, no accelerator.

States (weights, gradients, optimizer) are exact up to padding; activations count what autograd keeps of a micro-batch
of `data.max_length` tokens a sample with evenly loaded experts, and are good to about a third.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ds_moe.checks import expert_count
from ds_moe.config import RunConfig
from ds_moe.models.classes import MODEL_CLASSES
from ds_moe.models.convert import expert_state

GIB = 2**30
ADAM_BYTES = 12  # an element: fp32 master weight and two moments, which ZeRO keeps apart under fp32 too
LOGIT_BYTES = 8  # a logit, beside its own width: the fp32 copy of the loss and its gradient
RUNTIME_BYTES = {"cpu": GIB // 2, "accelerator": 3 * GIB // 2}  # libraries, context, communication buffers


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by purpose, on the device that computes and on the host it is offloaded to."""

    device: dict[str, int]
    host: dict[str, int]

    def table(self) -> list[str]:
        """Lines of purpose and GiB, with the totals."""
        rows = [("on the device", name, size) for name, size in self.device.items()]
        rows += [("on the host", name, size) for name, size in self.host.items()]
        rows.append(("on the device", "total", sum(self.device.values())))
        return [f"{name:<22}{size / GIB:>9.3f} GiB  {where}" for where, name, size in rows if size]


@dataclass(frozen=True)
class Load:
    """Bytes of one rank while the model is loaded, before anything is sharded."""

    host: int  # the complete model
    device: int  # all weights but other ranks' experts: what DeepSpeed moves there, under ZeRO-3 too


def skeleton(model_config: PretrainedConfig) -> PreTrainedModel:
    """The model with its parameters' names and shapes but no storage (the meta device)."""
    with torch.device("meta"):
        return MODEL_CLASSES[model_config.model_type]()(model_config)


def load(model: PreTrainedModel, config: RunConfig, ds: dict[str, Any]) -> Load:
    """Memory of one rank at the start; arguments as for `predict`."""
    width, ep_size = _width(ds), config.moe.ep_size if config.moe else 1
    sizes = {True: 0, False: 0}  # elements of the experts, and of all else
    for name, parameter in model.named_parameters():
        sizes[bool(expert_state(name))] += parameter.numel()
    return Load(width * sum(sizes.values()), width * (sizes[False] + sizes[True] // ep_size))


def predict(model: PreTrainedModel, config: RunConfig, ds: dict[str, Any], world_size: int, on_cpu: bool) -> Memory:
    """Memory of one rank.

    Args:
        model: a `skeleton` (unconverted), with the frozen parameters marked.
        config: the run.
        ds: from `resolve_deepspeed`.
        world_size: number of ranks, a multiple of `moe.ep_size`.
        on_cpu: whether the ranks train on CPUs, which have no context but hold everything in host memory.
    """
    zero, width = ds["zero_optimization"], _width(ds)
    stage, ep_size = zero["stage"], config.moe.ep_size if config.moe else 1
    held = {True: 0.0, False: 0.0}  # elements of this rank's copy: trainable or not
    for name, parameter in model.named_parameters():
        held[parameter.requires_grad] += parameter.numel() / (ep_size if expert_state(name) else 1)
    owned = {
        trainable: _elements(model, trainable, world_size) for trainable in (True, False)
    }  # experts over EP x EDP ranks, the rest over DP ranks: both are all ranks

    weights = sum(owned.values()) if stage == 3 else sum(held.values())
    gradients = held[True] if stage == 1 else owned[True]
    offload = {
        name: (zero.get(f"offload_{name}") or {}).get("device", "none") != "none" for name in ("optimizer", "param")
    }
    device: dict[str, float] = {
        "weights": width * weights,
        "gathered layer": width * _largest_gather(model, ep_size) if stage == 3 else 0,
        "gradients": width * gradients,
        "optimizer": ADAM_BYTES * owned[True],
        "fp32 gradient of step": 4 * min(owned[True], zero.get("sub_group_size", 1e9)),
        "buckets": width * _buckets(zero),
        **_activations(model, config, width, ep_size),
        "runtime": RUNTIME_BYTES["cpu" if on_cpu else "accelerator"],
    }
    host: dict[str, float] = {}
    if offload["optimizer"]:
        host["optimizer"] = device.pop("optimizer") + device.pop("fp32 gradient of step")
    if offload["param"]:
        host["weights"] = device.pop("weights")
    return Memory(*({name: int(size) for name, size in part.items()} for part in (device, host)))


def _width(ds: dict[str, Any]) -> int:
    """Bytes of a weight."""
    return 2 if ds["bf16"]["enabled"] else 4


def _elements(model: nn.Module, trainable: bool, ranks: int) -> float:
    return sum(p.numel() for p in model.parameters() if p.requires_grad == trainable) / ranks


def _largest_gather(model: nn.Module, ep_size: int) -> float:
    """Elements of the largest module that ZeRO-3 holds complete at once: two decoder layers or the embedding."""
    sizes: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        before, layers, after = name.partition(".layers.")
        unit = f"{before}{layers}{after.partition('.')[0]}" if layers else name
        sizes[unit] = sizes.get(unit, 0) + parameter.numel() / (ep_size if expert_state(name) else 1)
    layer = max((size for unit, size in sizes.items() if ".layers." in unit), default=0)
    return max(2 * layer, *sizes.values())  # the one that computes and the one that is fetched


def _buckets(zero: dict[str, Any]) -> float:
    """Elements of communication buffers."""
    reduce = zero.get("reduce_bucket_size", 5e8)
    if zero["stage"] == 3:
        return reduce + zero.get("stage3_prefetch_bucket_size", 5e7)
    return reduce + zero.get("allgather_bucket_size", 5e8)


def _activations(model: PreTrainedModel, config: RunConfig, width: int, ep_size: int) -> dict[str, float]:
    """Bytes that a micro-batch keeps for its backward pass, and those of its logits."""
    text = model.config.get_text_config()
    tokens = config.train.micro_batch_size * config.data.max_length
    heads, head_dim = text.num_attention_heads, getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    attention = 3 * head_dim * (heads + 2 * text.num_key_value_heads)  # projected, normalised, rotated
    if config.model.attention == "eager":
        attention += 2 * heads * config.data.max_length  # the attention matrix and its softmax
    top_k = 0
    if expert_count(model.config):
        top_k = (config.moe.router.top_k if config.moe else None) or text.num_experts_per_tok
        mlp = top_k * _kept_by_experts(config, text.hidden_size, text.moe_intermediate_size)
    else:
        mlp = 4 * text.intermediate_size
    norms = 14 * text.hidden_size  # two RMSNorms that compute in fp32, and the residual stream
    layer = width * tokens * (attention + mlp + norms)
    kept = _kept(layer, width * tokens * text.hidden_size, text.num_hidden_layers, config.train.gradient_checkpointing)
    if ep_size > 1:  # rows of the layer at work: packed, arrived, sorted, on their way back
        kept += width * tokens * 4 * top_k * text.hidden_size
    return {
        "activations": kept + _vision_activations(model, tokens, width, config.train.gradient_checkpointing),
        "logits": tokens * text.vocab_size * (width + LOGIT_BYTES),
    }


def _kept_by_experts(config: RunConfig, model_width: int, expert_width: int) -> int:
    """Numbers a row: `moe/backends/swiglu.py` keeps its input and what `recompute` says, others all they compute."""
    experts = config.moe.experts if config.moe else None
    if experts is None or experts.backend == "reference" or (config.lora is not None and config.lora.experts):
        return 2 * model_width + 4 * expert_width
    return model_width + {"none": 3, "act": 2, "all": 0}[experts.recompute] * expert_width


def _vision_activations(model: PreTrainedModel, tokens: int, width: int, checkpointing: bool) -> float:
    """Bytes of the vision tower where half of all tokens are image tokens; a frozen tower keeps one layer at a time."""
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        return 0
    patches = tokens // 2 * vision.spatial_merge_size**2
    layer = width * patches * (20 * vision.hidden_size + 4 * vision.intermediate_size)
    if not any(p.requires_grad for name, p in model.named_parameters() if "visual." in name):
        return layer
    return _kept(layer, width * patches * vision.hidden_size, vision.depth, checkpointing)


def _kept(layer: float, boundary: float, layers: int, checkpointing: bool) -> float:
    return layers * boundary + layer if checkpointing else layers * layer
