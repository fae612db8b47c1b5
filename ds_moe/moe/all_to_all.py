"""Rows on their way between the ranks that share one copy of the experts, and the bytes that takes.

An exchange is two autograd functions: one starts it, the other waits for it. What runs between them, forward or
backward, runs while the rows travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass
class ExpertParallel:
    """Where one rank stands among the ranks that share one copy of the experts.

    `group` may be filled in later (DeepSpeed creates its groups during `initialize`); it is read at every forward.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    sent_bytes: int = 0  # to other ranks, by this one, since it was last set to 0

    def owned(self, num_experts: int) -> slice:
        """The global experts of this rank: a contiguous block."""
        if num_experts % self.size:
            raise ValueError(f"ep_size={self.size} does not divide the {num_experts} experts")
        local = num_experts // self.size
        return slice(self.rank * local, (self.rank + 1) * local)

    def start(self, given: Tensor, send: list[int], receive: list[int]) -> tuple[Tensor, dist.Work]:
        """Exchange slices of the first dimension: `send[p]` to rank p, `receive[p]` from it. Collective.

        `given` is contiguous; it and the result belong to the exchange until the work has been waited for.
        """
        arriving = given.new_empty(sum(receive), *given.shape[1:])
        work = dist.all_to_all_single(arriving, given, receive, send, group=self.group, async_op=True)
        assert work is not None  # only ranks outside of the group get none
        self.sent_bytes += (sum(send) - send[self.rank]) * given[:1].numel() * given.element_size()
        return arriving, work


class Counts:
    """The exchange of how many rows each rank has for each expert, and its way to the host.

    Uneven exchanges need their sizes on the host: the layer's only sync. `on_host` waits for it, so that what the
    device was given in between does not.

    Args:
        sent_Pne: int64 rows of this rank for each rank, part and expert of the part.
    """

    def __init__(self, sent_Pne: Tensor, ep: ExpertParallel) -> None:
        self.sent_Pne = sent_Pne.contiguous()
        even = [1] * ep.size
        self.received_Pne, self._work = ep.start(self.sent_Pne, even, even)
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None
        if sent_Pne.is_cuda:
            # On a stream of its own: the one that packs the rows does not wait for the counts of other ranks.
            with torch.cuda.stream(torch.cuda.Stream()):
                self._work.wait()  # orders this stream, not the host
                sums = self._sums()
                copy = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True).copy_(sums, non_blocking=True)
                copied = torch.cuda.Event()
                copied.record()
            self._copy = copy, copied

    def _sums(self) -> Tensor:
        return torch.stack([self.sent_Pne.sum(2), self.received_Pne.sum(2)]).transpose(1, 2)

    def on_host(self) -> tuple[list[list[int]], list[list[int]]]:
        """Rows to send to, and to receive from, each rank: [part][rank]."""
        if self._copy is None:
            self._work.wait()
            send, receive = self._sums().tolist()
        else:
            copy, copied = self._copy
            copied.synchronize()
            send, receive = copy.tolist()
        return send, receive


class Trip:
    """One exchange of tensors whose first dimension is rows; the gradients take the way back."""

    def __init__(self, ep: ExpertParallel, send: list[int], receive: list[int]) -> None:
        self.ep, self.splits = ep, (send, receive)
        self._under_way: list[tuple[Tensor, Tensor, dist.Work]] = []  # what leaves is kept until it has left

    def launch(self, tensors: tuple[Tensor, ...], back: bool = False) -> tuple[Tensor, ...]:
        splits = self.splits[::-1] if back else self.splits
        packed = [tensor.contiguous() for tensor in tensors]
        self._under_way = [(tensor, *self.ep.start(tensor, *splits)) for tensor in packed]
        return tuple(arriving for _, arriving, _ in self._under_way)

    def wait(self) -> tuple[Tensor, ...]:
        """What has arrived."""
        under_way, self._under_way = self._under_way, []
        for _, _, work in under_way:
            work.wait()
        return tuple(arrived for _, arrived, _ in under_way)


def depart(trip: Trip, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Start `trip`; the results must not be read before `arrive`."""
    return _Depart.apply(trip, *tensors)


def arrive(trip: Trip, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Wait for what `depart` returned."""
    return _Arrive.apply(trip, *tensors)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        return trip.launch(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients given are stand-ins of the shape that autograd wants: the real ones have been travelling."""
        return None, *ctx.trip.wait()


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        return tuple(arrived.view_as(arrived) for arrived in trip.wait())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """A gradient that nothing asked for is a tensor of zeros: every rank takes part in every exchange."""
        ctx.trip.launch(grads, back=True)
        return None, *grads
