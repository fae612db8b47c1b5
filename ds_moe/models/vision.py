"""Ranks without images run the vision tower too, so that all ranks run the same collectives."""

from collections.abc import Callable
from functools import wraps
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from ds_moe.data.processor import Inputs
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
    if family.images == "views":
        _see_tiles_always(model)
    model.get_submodule(str(family.vision)).register_forward_hook(note)
    model.get_submodule(family.decoder).register_forward_pre_hook(hook, with_kwargs=True)


def _see_tiles_always(model: PreTrainedModel) -> None:
    """Have the tower of a model that sees images whole, and then all of their tiles, run twice where none of a rank's
    images is cut too: the second time over a blank tile, of one token, which is added with weight zero."""
    base = model.base_model
    own_features = base.get_image_features

    @wraps(own_features)  # `generate` reads the arguments from the signature
    def get_image_features(
        pixel_values: Tensor,
        pixel_values_local: Tensor | None = None,
        num_local_patches: list[int] | None = None,
        **kwargs: object,
    ) -> ModelOutput:
        if pixel_values_local is not None or not parallel():
            return own_features(pixel_values, pixel_values_local, num_local_patches, **kwargs)
        blank = _views(model.config)["pixel_values_local"].to(pixel_values)
        found = own_features(pixel_values, blank, [1, *[0] * (len(pixel_values) - 1)], **kwargs)
        tile_1D, view_TD = found.pooler_output[0].tensor_split([1])
        found.pooler_output = [view_TD + tile_1D * 0.0, *found.pooler_output[1:]]
        return found

    base.get_image_features = get_image_features


def encode_blank(model: PreTrainedModel, device: torch.device) -> Tensor | None:
    """A vision pass over one blank image: a zero scalar that depends on every vision parameter.

    None: no pass is needed, because a whole tower without gradients takes part in no collective.
    """
    family, base = family_of(model), model.base_model
    parameters = [one for path in family.vision_paths for one in model.get_submodule(path).parameters()]
    sharded = any(hasattr(parameter, "ds_id") for parameter in parameters)
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
    if not (sharded or trained):
        return None
    tower = model.get_submodule(str(family.vision))
    blank = BLANKS[family.images](model.config)
    for name in {"pixel_values", "pixel_values_local"} & blank.keys():
        blank[name] = blank[name].to(device, tower.dtype)
    if "image_position_ids" in blank:  # sizes stay on the host, where they are read; places do not
        blank["image_position_ids"] = blank["image_position_ids"].to(device)
    # The class's own method: ranks that share rows have another one, which exchanges features.
    features = type(base).get_image_features(base, **blank, return_dict=True)
    parts = [features.pooler_output, *(getattr(features, "deepstack_features", None) or ())]
    flat = [one for part in parts for one in (part if isinstance(part, tuple | list) else (part,))]
    return torch.stack([part.sum() for part in flat]).sum() * 0.0


def merged_side(config: PretrainedConfig) -> int:
    """Patches a side of those that become one image token, of a model with this config."""
    vision = config.vision_config
    if family_of(config).images == "views":  # two convolutions of stride 2, of which the config says nothing
        return 4
    found = getattr(vision, "merge_kernel_size", None) or getattr(vision, "pooling_kernel_size", None)
    found = found or getattr(vision, "spatial_merge_size", 1)
    return found if isinstance(found, int) else found[0]


def _patches(config: PretrainedConfig) -> Inputs:
    vision, side = config.vision_config, merged_side(config)
    channels = getattr(vision, "in_channels", None) or vision.num_channels
    width = channels * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": torch.zeros(side * side, width), "image_grid_thw": torch.tensor([[1, side, side]])}


def _squares(config: PretrainedConfig) -> Inputs:
    side, patch = merged_side(config), config.vision_config.patch_size
    grid = torch.tensor([[1, side, side]])
    return {"pixel_values": torch.zeros(side * side, 3, patch, patch), "image_grid_thw": grid}


def _places(config: PretrainedConfig) -> Inputs:
    side, patch = merged_side(config), config.vision_config.patch_size
    axis = torch.arange(side)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, -1, 2)
    return {"pixel_values": torch.zeros(1, side * side, 3 * patch**2), "image_position_ids": places}


def _tiles(config: PretrainedConfig) -> Inputs:
    vision = config.vision_config
    return {"pixel_values": torch.zeros(1, vision.num_channels, *vision.image_size)}


def _views(config: PretrainedConfig) -> Inputs:
    vision = config.vision_config
    patch = torch.zeros(1, vision.num_channels, vision.patch_size, vision.patch_size)
    return {"pixel_values": patch, "pixel_values_local": patch.clone(), "num_local_patches": [1]}


# How a tower is given images (`Family.images`) -> arguments of a model with this config that make the smallest one, all
# of whose pixels are 0.
BLANKS: dict[str, Callable[[PretrainedConfig], Inputs]] = {
    **{"patches": _patches, "squares": _squares, "places": _places, "tiles": _tiles, "views": _views}
}
