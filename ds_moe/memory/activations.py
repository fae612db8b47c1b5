"""Activations of a micro-batch, counted from configs: what autograd and our functions save for the backward pass.

The micro-batch is the largest that is possible: a full packed row, or `train.micro_batch_size` samples of
`data.max_length` tokens without padding. Every token is taken to have a label, since the data alone would tell; tiles
bound what that costs. Tokens are assumed to be routed evenly, and half of them to be image tokens if the model takes
images. Letters of shapes are explained in `ds_moe/moe/decision.py`.
"""

import re
from dataclasses import dataclass
from math import lcm
from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedModel

from ds_moe.config.rules.model import expert_count, experts_per_token
from ds_moe.config.run import RunConfig
from ds_moe.models.families import family_of
from ds_moe.models.head import ACCELERATOR_TILE_BYTES, TILE_BYTES

IMAGE_SHARE = 0.5  # of the tokens
SOFTMAX_BYTES = (
    8  # per logit of a tile, where no kernel of a GPU makes its gradient: the softmax and a step before it, fp32
)
INPUTS_ON_DEVICE = 3  # of checkpointed layers, with train.offload_activations: the newest, and two on their way
ASSIGNMENT_BYTES = 80  # int64 indices of token, expert, sorted order and its inverse, and fp32 weights


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank."""

    kept: int  # what all layers save from forward to backward; with gradient checkpointing only each layer's input
    moved: int  # host memory of the inputs that `train.offload_activations` moves; `kept` counts the others
    layer: int  # what one text layer saves
    repeated: int  # `layer` where gradient checkpointing computes it again, on top of what is kept; otherwise 0
    work: int  # gradients of rows in the layer whose backward pass runs
    exchange: int  # rows packed for other ranks and rows received from them, in one layer
    logits: int  # a tile of logits as it goes back, and the gradient of the hidden states behind them


NO_ACTIVATIONS = Activations(0, 0, 0, 0, 0, 0, 0)


def tokens_of(config: RunConfig) -> int:
    """Tokens of the largest micro-batch of a rank, or of its part where ranks share a row."""
    if config.data.packing:
        return -(-config.tokens_per_row // config.train.sequence_parallel)
    return config.train.micro_batch_size * config.data.max_length


def activations(
    model: PreTrainedModel, config: RunConfig, width: int, ep_size: int, on_cpu: bool = True
) -> Activations:
    """Of one micro-batch, of an outline (`models/load.py`) whose frozen parameters are marked.

    Args:
        width: bytes of a weight, and of an element of what one layer hands to the next.
        on_cpu: whether the ranks train on CPUs, where `train.offload_activations` moves nothing.
    """
    text = model.config.get_text_config()
    T, D, layers = tokens_of(config), text.hidden_size, text.num_hidden_layers
    K = _top_k(model, config)
    learns = _learns(model)
    layer = T * (_attention(text, config, width, learns) + _mlp(text, config, width, K, learns))
    head = T * (_norm(D, width, learns["norms"]) + width * D)
    vision = _vision(model, T) if learns["vision"] else None
    if not config.train.gradient_checkpointing:
        kept, moved = layers * layer + (width * (vision.ends + vision.layers * vision.layer) if vision else 0), 0
    else:
        kept = layers * ASSIGNMENT_BYTES * T * K  # the tape keeps the routing for the recompute
        inputs = [T * D] * layers
        if vision:
            kept += width * (vision.ends + vision.layer)
            inputs = [vision.input] * vision.layers + inputs
        moves = config.train.offload_activations and not on_cpu
        kept += width * sum(inputs[-INPUTS_ON_DEVICE:] if moves else inputs)
        moved = width * sum(map(_buffer, inputs[:-1])) if moves else 0
    return Activations(
        kept=int(kept + head),
        moved=int(moved),
        layer=int(layer),
        repeated=int(layer) if config.train.gradient_checkpointing else 0,
        work=int(T * width * _row_gradients(text, K)),
        exchange=2 * T * K * D * width if ep_size > 1 else 0,
        logits=int(_tile(text.vocab_size, T, width, on_cpu) + T * D * width),
    )


def _tile(vocabulary: int, T: int, width: int, on_cpu: bool) -> int:
    """Bytes of a tile's logits, of their gradient, and of what is made on the way (`models/head.py`)."""
    size = TILE_BYTES["cpu"] if on_cpu else ACCELERATOR_TILE_BYTES
    rows = min(T, max(1, size // (vocabulary * width)))
    return rows * vocabulary * (2 * width + (SOFTMAX_BYTES if on_cpu else 0))


def _buffer(elements: float) -> int:
    """Elements of the host buffer that an input is moved to: a power of two, see `engine/activation_offload.py`."""
    return 1 << (int(elements) - 1).bit_length()


def _top_k(model: PreTrainedModel, config: RunConfig) -> int:
    """Experts of a token; 0 for a dense model."""
    if not expert_count(model.config):
        return 0
    return (config.moe.router.top_k if config.moe else None) or experts_per_token(model.config)


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
    Ranks that share rows repeat k and v until each has one of their heads.
    """
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    q, kv = head_dim * text.num_attention_heads, head_dim * text.num_key_value_heads
    normed = _norm(text.hidden_size, width, learns["norms"]) + width * text.hidden_size * learns["attention"]
    repeated = lcm(text.num_key_value_heads, config.train.sequence_parallel) // text.num_key_value_heads
    kernel = width * (2 * q + 2 * kv * repeated) + 4 * text.num_attention_heads
    size = normed + _norm(q + kv, width, learns["norms"]) + kernel
    if config.data.packing and config.model.attention == "sdpa":
        size += width * q  # `models/attention.py` joins the outputs of the samples
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


class _Vision(NamedTuple):
    """Elements that a trained vision tower saves."""

    layers: int
    input: float  # of one layer
    layer: float  # what one layer saves
    ends: float  # what stands before and behind the layers saves


def _vision(model: PreTrainedModel, T: int) -> _Vision | None:
    """None for a model without images. A frozen tower runs without a graph and saves nothing."""
    vision: PretrainedConfig | None = getattr(model.config, "vision_config", None)
    if vision is None:
        return None
    patches = IMAGE_SHARE * T * vision.spatial_merge_size**2
    # Two LayerNorms with their inputs (4D), q, k and the product that v is a view of (5D), the output of attention for
    # each image and concatenated (2D), and input and output of the GELU.
    layer = 11 * vision.hidden_size + 2 * vision.intermediate_size
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    mergers = 4 * vision.hidden_size * (1 + len(vision.deepstack_visual_indexes))  # norm, GELU's input and output
    return _Vision(vision.depth, patches * vision.hidden_size, patches * layer, patches * (pixels + mergers))
