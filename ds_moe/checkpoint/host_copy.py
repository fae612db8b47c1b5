"""Copies values from an accelerator to host memory through page-locked buffers."""

import torch
from torch import Tensor

CHUNK = 2**26  # bytes; two of them are page-locked for as long as a checkpoint is collected


class HostCopy:
    """Makes copies in host memory that nobody else refers to.

    A device copies to page-locked memory several times as fast as to other memory, but locking 12 bytes a parameter
    would take that memory from the host for good, as torch keeps it. So values pass through two buffers: one is filled
    by the device while the other is emptied.

    Args:
        device: of the values.
        chunk: bytes of a buffer.
    """

    def __init__(self, device: torch.device, chunk: int = CHUNK) -> None:
        self._on_device = device.type == "cuda"
        self._buffers = [torch.empty(chunk, dtype=torch.uint8, pin_memory=self._on_device) for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in range(2)] if self._on_device else []

    def __call__(self, value: Tensor) -> Tensor:
        """The copy, contiguous."""
        copy = torch.empty(value.shape, dtype=value.dtype)
        given, taken = (one.view(-1).view(torch.uint8) for one in (value.detach().contiguous(), copy))
        chunk = self._buffers[0].numel()
        pieces = [slice(start, min(start + chunk, len(taken))) for start in range(0, len(taken), chunk)]
        for number, piece in enumerate(pieces):
            self._fill(number % 2, given[piece])
            if number:
                self._empty((number - 1) % 2, taken[pieces[number - 1]])
        if pieces:
            self._empty((len(pieces) - 1) % 2, taken[pieces[-1]])
        return copy

    def _fill(self, which: int, given: Tensor) -> None:
        self._buffers[which][: len(given)].copy_(given, non_blocking=True)
        if self._on_device:
            self._events[which].record()

    def _empty(self, which: int, taken: Tensor) -> None:
        if self._on_device:
            self._events[which].synchronize()
        taken.copy_(self._buffers[which][: len(taken)])
