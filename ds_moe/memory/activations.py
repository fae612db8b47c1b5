"""Activations of a micro-batch, counted from configs: what autograd and our functions save for the backward pass.

The micro-batch is the largest that is possible: `train.micro_batch_size` samples of `data.max_length` tokens without
padding. Tokens are assumed to be routed evenly, and half of them to be image tokens if the model takes images. Letters
of shapes are explained in `ds_moe/moe/decision.py`.
"""

import re
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from ds_moe.config.rules.model import expert_count
from ds_moe.config.run import RunConfig
from ds_moe.models.families import family_of

IMAGE_SHARE = 0.5  # of the tokens
LOGIT_BYTES = 12  # per logit as the backward pass begins, in fp32: the log-softmax, its gradient, the logit's gradient
ASSIGNMENT_BYTES = 80  # int64 indices of token, expert, sorted order and its inverse, and fp32 weights


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank."""

    kept: int  # what all layers save from forward to backward; with gradient checkpointing only each layer's input
    layer: int  # what one text layer saves
    repeated: int  # `layer` where gradient checkpointing computes it again, on top of what is kept; otherwise 0
    work: int  # gradients of rows in the layer whose backward pass runs
    exchange: int  # rows packed for other ranks and rows received from them, in one layer
    logits: int  # logits and what the loss makes of them
    vision: int  # the largest layer of a frozen vision tower while it computes; it saves nothing


def activations(model: PreTrainedModel, config: RunConfig, width: int, ep_size: int) -> Activations:
    """Of one micro-batch, of an outline (`models/load.py`) whose frozen parameters are marked.

    Args:
        width: bytes of a weight, and of an element of what one layer hands to the next.
    """
    text = model.config.get_text_config()
    T, D = config.train.micro_batch_size * config.data.max_length, text.hidden_size
    K = _top_k(model, config)
    learns = _learns(model)
    layer = T * (_attention(text, config, width, learns) + _mlp(text, config, width, K, learns))
    boundary = T * (width * D + ASSIGNMENT_BYTES * K)  # with its routing, which the tape keeps for the recompute
    repeats = config.train.gradient_checkpointing
    head = T * (_norm(D, width, learns["norms"]) + width * D * learns["head"])
    seen, frozen = _vision(model, T, width, repeats, learns["vision"])
    return Activations(
        kept=int(text.num_hidden_layers * (boundary if repeats else layer) + head + seen),
        layer=int(layer),
        repeated=int(layer) if repeats else 0,
        work=int(T * width * _row_gradients(text, K)),
        exchange=2 * T * K * D * width if ep_size > 1 else 0,
        logits=T * text.vocab_size * LOGIT_BYTES,
        vision=int(frozen),
    )


def _top_k(model: PreTrainedModel, config: RunConfig) -> int:
    """Experts of a token; 0 for a dense model."""
    if not expert_count(model.config):
        return 0
    return (config.moe.router.top_k if config.moe else None) or model.config.get_text_config().num_experts_per_tok


def _learns(model: PreTrainedModel) -> dict[str, bool]:
    """For each kind of module, whether weights of it are trained, which makes it keep its input.

    A weight that is frozen, such as one under LoRA, needs only itself to compute the gradient of its input.
    """
    family = family_of(model)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    kinds = {**family.readers, "head": family.parts["embeddings"], "vision": family.parts["vision"]}
    return {kind: any(re.search(pattern, name) for name in names) for kind, pattern in kinds.items()}


def _norm(features: int, width: int, learns: bool) -> int:
    """Bytes per token that an RMSNorm saves: its input in fp32, and if its weight is trained what that multiplies."""
    return features * (4 + width * learns)


def _attention(text: PretrainedConfig, config: RunConfig, width: int, learns: dict[str, bool]) -> int:
    """Bytes per token of a layer's first half.

    Its norm, q and k with their norms, and what the kernel saves: q, k, v, the output and the log-sum-exp in fp32.
    """
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    q, kv = head_dim * text.num_attention_heads, head_dim * text.num_key_value_heads
    normed = _norm(text.hidden_size, width, learns["norms"]) + width * text.hidden_size * learns["attention"]
    size = normed + _norm(q + kv, width, learns["norms"]) + width * (2 * q + 2 * kv) + 4 * text.num_attention_heads
    if config.model.attention == "eager":  # keys and values of every head, the softmax (in fp32) and its cast
        size += 2 * width * q + text.num_attention_heads * config.data.max_length * (4 if width == 4 else 4 + width)
    return size


def _mlp(text: PretrainedConfig, config: RunConfig, width: int, K: int, learns: dict[str, bool]) -> int:
    """Bytes per token of a layer's second half: its norm, then router and experts or one dense SwiGLU."""
    D = text.hidden_size
    size = _norm(D, width, learns["norms"]) + width * D * learns["mlp"]
    if not K:
        return size + 4 * width * text.intermediate_size  # gate, SiLU of the gate, up, and the product of both
    rows = K * (width * _kept_by_experts(config, D, text.moe_intermediate_size) + ASSIGNMENT_BYTES)
    return size + 2 * 4 * text.num_experts + rows  # scores and balancers in fp32


def _kept_by_experts(config: RunConfig, D: int, F: int) -> int:
    """Elements per row. `moe/backends/swiglu.py` saves its input and, by `recompute`, more; other backends save all."""
    experts = config.moe.experts if config.moe else None
    if experts is None or experts.backend == "reference" or (config.lora is not None and config.lora.experts):
        return D + 5 * F  # the products (2F), SiLU, activation, and that times its weight
    return D + {"none": 3, "act": 2, "all": 0}[experts.recompute] * F


def _row_gradients(text: PretrainedConfig, K: int) -> int:
    """Elements per token: gradients of output and input rows and of both products, and the recomputed activation."""
    if not K:
        return 2 * text.hidden_size + 3 * text.intermediate_size
    return K * (2 * text.hidden_size + 3 * text.moe_intermediate_size)


def _vision(model: PreTrainedModel, T: int, width: int, repeats: bool, learns: bool) -> tuple[float, float]:
    """Bytes that a trained vision tower saves, and bytes of one layer of a frozen one."""
    vision: PretrainedConfig | None = getattr(model.config, "vision_config", None)
    if vision is None:
        return 0, 0
    patches = IMAGE_SHARE * T * vision.spatial_merge_size**2
    # Two LayerNorms with their inputs (4D), q, k and the product that v is a view of (5D), the output of attention for
    # each image and concatenated (2D), and input and output of the GELU.
    layer = width * patches * (11 * vision.hidden_size + 2 * vision.intermediate_size)
    if not learns:
        return 0, layer
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    mergers = 4 * vision.hidden_size * (1 + len(vision.deepstack_visual_indexes))  # norm, GELU's input and output
    ends = width * patches * (pixels + mergers)
    return ends + (vision.depth * width * patches * vision.hidden_size + layer if repeats else vision.depth * layer), 0
