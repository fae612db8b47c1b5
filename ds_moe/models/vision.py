"""Ranks without images stay in step with those that have some."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_moe.distributed import parallel
from ds_moe.models.generation import cache_of


def has_vision(model: nn.Module) -> bool:
    return hasattr(model.config, "vision_config")


def keep_vision_in_step(model: PreTrainedModel) -> None:
    """Give every forward without an image a vision pass over a blank one, added to the text with weight zero.

    Under data parallelism all ranks must run the same collectives: ZeRO-3 gathers the vision tower, and its gradients
    are reduced, on all of them. The pass runs after the text embedding and before the decoder, where a real one has
    just run, and covers the DeepStack features, so forward and backward visit the parameters in the same order.

    A forward with a cache belongs to `generate`, which encodes images before it: there a rank without an image calls
    `encode_blank` itself.
    """

    def hook(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        generating = cache_of(kwargs) is not None
        if generating or kwargs.get("visual_pos_masks") is not None or not parallel():
            return args, kwargs
        embeds_BSD: Tensor = kwargs["inputs_embeds"]
        return args, {
            **kwargs,
            "inputs_embeds": embeds_BSD + encode_blank(model, embeds_BSD.device).to(embeds_BSD.dtype),
        }

    model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)


def encode_blank(model: PreTrainedModel, device: torch.device) -> Tensor:
    """A vision pass over one blank image: a zero scalar that depends on every vision parameter."""
    vision = model.config.vision_config
    side = vision.spatial_merge_size
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.zeros(side * side, width, device=device, dtype=model.model.visual.dtype)
    grid = torch.tensor([[1, side, side]], device=device)
    features = model.model.visual(pixels, grid_thw=grid, return_dict=True)
    return torch.stack([part.sum() for part in (features.pooler_output, *features.deepstack_features)]).sum() * 0.0
