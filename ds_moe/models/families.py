"""The transformers class of each supported model family, imported when it is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

MODEL_CLASSES: dict[str, Callable[[], type[PreTrainedModel]]] = {
    "qwen3_vl_moe": lambda: transformers.Qwen3VLMoeForConditionalGeneration,
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM,
    "qwen3_vl": lambda: transformers.Qwen3VLForConditionalGeneration,
}


@dataclass(frozen=True)
class Family:
    """What differs between model families.

    Attributes:
        block: class name of the MoE block; it holds a router `gate` (`weight`) and fused `experts`
            (`gate_up_proj`, `down_proj`, `act_fn`).
        decoder: path of the text decoder, which sees the padding mask and the positions of image tokens.
        normalizes: whether this config's router renormalises the top-k weights.
    """

    block: str
    decoder: str
    normalizes: Callable[[Any], bool]


FAMILIES = {
    "qwen3_vl_moe": Family("Qwen3VLMoeTextSparseMoeBlock", "model.language_model", lambda config: True),
    "qwen3_moe": Family("Qwen3MoeSparseMoeBlock", "model", lambda config: config.norm_topk_prob),
}


BIAS_SUFFIX = ".mlp.gate.balancing.bias_E"  # ends the name of a loss-free bias


def expert_state(name: str) -> bool:
    """Whether a parameter of a converted model belongs to the sharded experts, by its name."""
    return ".mlp.experts." in name


def full_shape(name: str, parameter: Tensor, ep_size: int) -> torch.Size:
    """The shape of a parameter over all ranks (ZeRO-3's `ds_shape` is the shape on one EP rank)."""
    shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
    return torch.Size([shape[0] * ep_size, *shape[1:]]) if expert_state(name) else shape
