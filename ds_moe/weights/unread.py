"""Weights that are still in their files: a shape and a dtype, without memory and with NaN for every value.

What is made beside a model's weights (adapters, biases, a router's noise) looks at shape, dtype and device alone, so a
model may be frozen, given adapters and converted first. Tensors on the meta device would not do: what is made like them
would have no values either.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_ONES = torch.full((8,), 255, dtype=torch.uint8)  # read as any float: NaN


def is_unread(weight: Tensor) -> bool:
    """Whether a weight, or a part of one, is in its file only."""
    return weight.untyped_storage().data_ptr() == _ONES.untyped_storage().data_ptr()


def leave_unread(model: PreTrainedModel) -> None:
    """Turn a model on the meta device into one whose parameters are unread and whose buffers have their values."""
    _compute_buffers(model)
    on_meta = dict(model.named_parameters())
    unread = {
        id(weight): nn.Parameter(_ONES.view(weight.dtype)[0].expand(weight.shape), weight.requires_grad)
        for weight in on_meta.values()
    }
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = unread[id(weight)]  # one for all that are tied


def _compute_buffers(model: PreTrainedModel) -> None:
    """Rotary frequencies and the like, which no file holds, as `from_pretrained` computes them."""
    for module in model.modules():
        on_meta = {name: buffer for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
        for name, buffer in on_meta.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if on_meta:
            module._is_hf_initialized = False
    model.initialize_weights()  # of what is not marked as initialized: these modules
