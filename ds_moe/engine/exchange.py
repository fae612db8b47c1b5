"""Another set of weights in the place of an engine's own for some forwards, whatever the ZeRO stage and EP size."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn


class FrozenCopy:
    """A copy in host memory of what this rank holds of a model's weights, as they are now.

    Each rank keeps and exchanges its own share, so that nothing is sent but small weights, which DeepSpeed keeps whole.
    The optimizer's state is not touched: nothing may be trained while the copy is in place.

    Args:
        buffers: that belong to the model's state.
    """

    def __init__(self, model: nn.Module, buffers: Iterable[Tensor]) -> None:
        self._model, self._buffers = model, list(buffers)
        self._copies = [value.detach().to("cpu", copy=True) for value in self._held()]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, forwards are those of the copy (collective)."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _held(self) -> Iterator[Tensor]:
        for parameter in self._model.parameters():
            yield parameter.ds_tensor.data if hasattr(parameter, "ds_id") else parameter.data
        yield from self._buffers

    @torch.no_grad()
    def _exchange(self) -> None:
        for value, copy in zip(self._held(), self._copies, strict=True):
            now = value.to("cpu", copy=True)
            value.copy_(copy)
            copy.copy_(now)
        for parameter in self._model.parameters():
            if hasattr(parameter, "ds_id") and parameter.ds_status is ZeroParamStatus.AVAILABLE:
                _gather_again(parameter)


def _gather_again(parameter: nn.Parameter) -> None:
    """DeepSpeed keeps small parameters gathered between forwards."""
    group = parameter.ds_process_group
    share = parameter.ds_tensor.data.to(parameter.data.device)  # in host memory where parameters are offloaded
    pieces = [torch.empty_like(share) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, share, group=group)
    whole = torch.cat([piece.flatten() for piece in pieces])[: parameter.ds_numel]
    parameter.data.copy_(whole.view(parameter.ds_shape))
