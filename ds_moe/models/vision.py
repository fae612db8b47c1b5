"""Ranks without images run the vision tower too, so that all ranks run the same collectives."""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_moe.distributed import parallel
from ds_moe.models.families import family_of
from ds_moe.models.generation import Arguments, Keywords, cache_of


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

    seen = False  # whether the tower has run since the decoder last began

    def note(tower: nn.Module, args: Arguments, output: object) -> None:
        nonlocal seen
        seen = True

    def hook(decoder: nn.Module, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords] | None:
        nonlocal seen
        with_images, seen = seen, False
        if with_images or cache_of(kwargs) is not None or not parallel():
            return None
        embeds_BSD = cast(Tensor, kwargs["inputs_embeds"])
        zero = encode_blank(model, embeds_BSD.device)
        seen = False
        if zero is None or not zero.requires_grad:
            return None
        return args, {**kwargs, "inputs_embeds": embeds_BSD + zero.to(embeds_BSD.dtype)}

    family = family_of(model)
    model.get_submodule(str(family.vision)).register_forward_hook(note)
    model.get_submodule(family.decoder).register_forward_pre_hook(hook, with_kwargs=True)


def encode_blank(model: PreTrainedModel, device: torch.device) -> Tensor | None:
    """A vision pass over one blank image: a zero scalar that depends on every vision parameter.

    None: no pass is needed, because a whole tower without gradients takes part in no collective.
    """
    config, tower = model.config.vision_config, model.get_submodule(str(family_of(model).vision))
    sharded = any(hasattr(parameter, "ds_id") for parameter in tower.parameters())
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters())
    if not (sharded or trained):
        return None
    side = config.spatial_merge_size
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.zeros(side * side, width, device=device, dtype=tower.dtype)
    grid = torch.tensor([[1, side, side]])  # on the host, where sizes are read
    features = tower(pixels, grid_thw=grid, return_dict=True)
    parts = [features.pooler_output, *(getattr(features, "deepstack_features", None) or ())]
    return torch.stack([part.sum() for part in parts]).sum() * 0.0
