"""Weights that are still in their files: parameters with a shape and a dtype, but no memory, and NaN for every value.

A model with unread weights can be frozen, given adapters and converted: what these steps make beside the weights
(adapters, biases, a router's noise) depends on their shape, dtype and device alone. Weights on the meta device would
not do, because tensors made like them would be on the meta device too and have no values.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# The memory that all unread weights share. Its bits are ones, which is NaN in every floating-point dtype, so that a
# weight which is used before it was read poisons the result. A weight is unread if its memory is this one.
_ONES = torch.full((8,), 255, dtype=torch.uint8)


def is_unread(weight: Tensor) -> bool:
    """Whether the values of a weight, or of a view of one, are in its file only."""
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
                module._parameters[name] = unread[id(weight)]  # tied weights stay one parameter


def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute buffers that no file holds, such as rotary frequencies, as `from_pretrained` does."""
    for module in model.modules():
        on_meta = {name: buffer for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
        for name, buffer in on_meta.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if on_meta:
            module._is_hf_initialized = False
    model.initialize_weights()  # it initialises only modules whose `_is_hf_initialized` is False
