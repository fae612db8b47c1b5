"""What gradient checkpointing keeps from forward to backward, moved to host memory in between."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.activation_checkpointing.offload_activations import _ActivationOffloadEngine
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import GradientCheckpointingLayer, PreTrainedModel

KEPT_LAYERS = 1  # the newest inputs, which the backward pass needs first and which therefore stay on the device
LAYERS_ON_THE_WAY = 2  # inputs whose copies to the host may be under way while the next layer computes
SMALLEST_BYTES = 1024  # a smaller input stays where it is


@dataclass(frozen=True)
class _Moved:
    """Stands in a graph for an input that was moved."""

    number: int


class ActivationOffload(_ActivationOffloadEngine):
    """Moves the hidden states that checkpointed layers are given to pinned host memory until their backward pass.

    Nothing else moves: no routing (the tape of `moe/tape.py` is no saved tensor), no loss, and nothing of a forward
    without gradients. CPUs, which compute in host memory already, move nothing. A forward with gradients must be
    followed by its backward.

    DeepSpeed's engine does the copies, on a stream of its own. Its `CheckpointHiddenStatesOffload`, which would use it,
    is not what a run needs:

    - It moves the tensor that a layer is called with. Under ZeRO-3 hooks replace that tensor before transformers
      checkpoints the layer's `forward`, so nothing moves. Here the input is taken where it is checkpointed.
    - It holds every input that came back until a context ends, so that when the backward pass ends all are on the
      device again. Here an input goes with the layer that read it.

    The engine's host buffers serve one shape each, and micro-batches differ in length: most would pin new memory. So
    sizes are powers of two here, to which torch's allocator of pinned memory rounds them up in any case.
    """

    def __init__(self, layers: int) -> None:
        """`layers`: how many inputs a micro-batch moves, for each of which host buffers are kept for the next."""
        super().__init__(
            min_offload_bytes=SMALLEST_BYTES,
            max_fwd_stash_count=LAYERS_ON_THE_WAY,
            max_cpu_buffer_pool_count=2 * layers,
            keep_last_count=KEPT_LAYERS,
        )

    @classmethod
    def enable(cls, model: PreTrainedModel) -> "ActivationOffload":
        """Put an offload between a model's layers and their checkpoints; gradient checkpointing must be enabled."""
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        offload = cls(len(layers))
        for layer in layers:
            layer._gradient_checkpointing_func = partial(offload.checkpoint, layer._gradient_checkpointing_func)
        return offload

    def checkpoint(
        self, checkpoint: Callable[..., Any], function: Callable[..., Any], hidden: Tensor, *more: Any
    ) -> Any:
        """What `checkpoint(function, hidden, *more)` returns. It saves `hidden` outside of the region's own hooks.

        A frozen tower's input is saved too, although no backward pass asks for it: moved, it would stay on the host.
        """
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return checkpoint(function, hidden, *more)

        def pack(tensor: Tensor) -> Tensor | _Moved:
            number = self.offload_input(tensor) if tensor is hidden else None
            return tensor if number is None else _Moved(number)

        def unpack(packed: Tensor | _Moved) -> Tensor:
            return self.restore_input(packed.number) if isinstance(packed, _Moved) else packed

        with saved_tensors_hooks(pack, unpack):
            return checkpoint(function, hidden, *more)

    def _empty_cpu_like(self, tensor: Tensor) -> tuple[Tensor, Any]:
        size = 1 << (tensor.numel() - 1).bit_length()
        buffer, key = super()._empty_cpu_like(torch.empty(size, dtype=tensor.dtype, device="meta"))
        return buffer[: tensor.numel()].view(tensor.shape), key

    def _pool_cpu_buffer(self, key: Any, tensor: Tensor) -> None:
        super()._pool_cpu_buffer(key, tensor if tensor._base is None else tensor._base)
