"""The vision tower of transformers, without what costs time and memory there and changes no result.

`lighten_tower` changes the classes of a loaded model's tower and of its patch embedding. Their parameters, names and
hooks stay as they are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.exporters.utils import precompute_export_inputs
from transformers.utils.generic import is_flash_attention_requested

from ds_moe.models.families import family_of

MADE = "position_ids"  # stands for all that `tower_inputs` makes, because it makes this of every grid
BOUNDS = {"cu_seqlens": "max_seqlen", "cu_window_seqlens": "max_window_seqlen"}  # of images, of windows -> the longest


def lighten_tower(model: PreTrainedModel) -> None:
    """Change, in place, how the vision tower of a loaded model computes; a model without one is left as it is.

    A convolution over one patch becomes a product. What the tower derives from the sizes of the images is made on the
    host. A frozen tower runs without a graph, whatever in it a hook has made to require a gradient. The decoder adds
    inner features of the tower (DeepStack) without asking the device how many tokens are of images.
    """
    family = family_of(model)
    if family.vision is None:
        return
    tower, decoder = model.get_submodule(family.vision), model.get_submodule(family.decoder)
    if hasattr(decoder, "_deepstack_process"):
        decoder._deepstack_process = _add_at
    for module in tower.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and type(module) in PATCHES and not _looks_around(module):
            module.__class__ = PATCHES[type(module)]
    tower.__class__ = _light(type(tower))


class _Patch:
    """A convolution that, of an input as large as its kernel, computes the product that it then is.

    Convolution kernels are made for images: over single patches cuDNN and oneDNN take many times the time.
    """

    kernel_size: tuple[int, ...]
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """(patches, channels, *kernel_size) to (patches, out_channels, 1, ...); anything else is convolved."""
        if x.shape[2:] != self.kernel_size:
            return super().forward(x)  # type: ignore[misc]
        y = F.linear(x.flatten(1), self.weight.flatten(1), self.bias)
        return y.view(*y.shape, *(1 for _ in self.kernel_size))


class Patch2d(_Patch, nn.Conv2d):
    """See `_Patch`."""


class Patch3d(_Patch, nn.Conv3d):
    """See `_Patch`."""


PATCHES = {nn.Conv2d: Patch2d, nn.Conv3d: Patch3d}


def _looks_around(conv: nn.Conv2d | nn.Conv3d) -> bool:
    """Whether a convolution is more than a product over patches: it pads, has holes, or reads only some channels."""
    padded = conv.padding not in ("valid", (0,) * len(conv.kernel_size))
    return bool(padded) or conv.groups > 1 or any(step > 1 for step in conv.dilation)


def _add_at(hidden_RSD: Tensor, mask_RS: Tensor, features_ND: Tensor) -> Tensor:
    """The hidden states with the features of N image tokens added where the mask is true, in their order."""
    features_ND = features_ND.to(hidden_RSD.device, hidden_RSD.dtype)
    return hidden_RSD + torch.zeros_like(hidden_RSD).masked_scatter(mask_RS.unsqueeze(-1), features_ND)


def outline_tower(config: PretrainedConfig) -> nn.Module | None:
    """The tower of a model with this config, without storage; None: it has none."""
    if family_of(config).vision is None:
        return None
    with torch.device("meta"):
        return AutoModel.from_config(config.vision_config)


def tower_inputs(tower: nn.Module, grid_thw: Tensor) -> dict[str, Any]:
    """What a tower derives from the sizes of its images: positions, interpolation, the bounds of images.

    Args:
        tower: its class and attributes are read, so that it may be one without storage.
        grid_thw: (I, 3) patches a side, on the host. On a device they are waited for, once; a tower by itself waits for
            its own values several times, and once more in every layer.
    """
    made: dict[str, Any] = {"grid_thw": grid_thw.cpu()}
    precompute_export_inputs(tower, made)
    for bounds, longest in BOUNDS.items():
        if bounds in made:
            made[longest] = int(made[bounds].diff().max())
    return made


def _light(base: type[nn.Module]) -> type[nn.Module]:
    """The class of a tower whose forward is that of `base`."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        pixels = args[0] if args else kwargs.pop("pixel_values")
        if kwargs.get("grid_thw") is not None:
            made = {} if kwargs.get(MADE) is not None else tower_inputs(self, kwargs["grid_thw"])
            kwargs = _placed(kwargs | made, pixels.device, is_flash_attention_requested(self.config))
        trained = any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return base.forward(self, pixels.to(self.dtype), *args[1:], **kwargs)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), {"forward": forward} | names)


def _placed(inputs: dict[str, Any], device: torch.device, flash: bool) -> dict[str, Any]:
    """The inputs where a tower reads them: sizes on the host, and all else on the device.

    Bounds are sizes too, by which every layer splits its tensors, unless flash attention reads them.
    """
    sizes = {"grid_thw"} if flash else {"grid_thw", *BOUNDS}
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and name not in sizes else value
        for name, value in inputs.items()
    }
