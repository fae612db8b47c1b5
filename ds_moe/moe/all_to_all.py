"""All-to-all of rows between the ranks that share one copy of the experts.

An `AllToAll` is two autograd functions, `start` and `wait`. In forward the rows travel from the one to the other; in
backward their gradients travel back, from the backward of `wait` to the backward of `start`. What a rank computes in
between, forward or backward, runs while the rows travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


@dataclass
class ExpertParallel:
    """Where one rank stands among the ranks that share one copy of the experts.

    `group` may be filled in later (DeepSpeed creates its groups during `initialize`); it is read at every forward.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    sent_bytes: int = 0  # that this rank sent to others; the trainer reads it and sets it back to 0

    def owned(self, num_experts: int) -> slice:
        """The global experts of this rank: a contiguous block."""
        if num_experts % self.size:
            raise ValueError(f"ep_size={self.size} does not divide the {num_experts} experts")
        local = num_experts // self.size
        return slice(self.rank * local, (self.rank + 1) * local)

    def all_to_all(self, given: Tensor, send: list[int], receive: list[int]) -> tuple[Tensor, dist.Work]:
        """Start to send `send[p]` slices of the first dimension to rank p and to receive `receive[p]` from it.

        Collective, without a gradient. `given` must be contiguous; neither it nor the result may be touched before the
        returned work has been waited for.
        """
        arriving = given.new_empty(sum(receive), *given.shape[1:])
        work = dist.all_to_all_single(arriving, given, receive, send, group=self.group, async_op=True)
        assert work is not None  # torch returns None only to ranks outside of the group
        self.sent_bytes += (sum(send) - send[self.rank]) * given[:1].numel() * given.element_size()
        return arriving, work


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all layers: streams come from a small pool, which DeepSpeed's and NCCL's are taken from too."""
    return torch.cuda.Stream(device)


class RowCounts:
    """How many rows each rank has for each expert: exchanged by an all-to-all, then copied to the host.

    An all-to-all of uneven sizes needs them on the host, which is the layer's only sync. It happens in `on_host`, so
    the device works on what it was given before that call while the counts travel. `sent_Pne` are int64 rows that this
    rank has for each rank P, chunk n of its experts, and expert e of the chunk.
    """

    def __init__(self, sent_Pne: Tensor, ep: ExpertParallel) -> None:
        self.sent_Pne = sent_Pne.contiguous()
        one_each = [1] * ep.size
        self.received_Pne, self._work = ep.all_to_all(self.sent_Pne, one_each, one_each)
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None
        if sent_Pne.is_cuda:
            # A stream of its own waits for the counts of the other ranks; the current stream goes on packing rows.
            with torch.cuda.stream(_side_stream(sent_Pne.device)):
                self._work.wait()  # makes this stream wait, not the host
                sums = self._sums()
                copy = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True).copy_(sums, non_blocking=True)
                copied = torch.cuda.Event()
                copied.record()
            self._copy = copy, copied

    def _sums(self) -> Tensor:
        return torch.stack([self.sent_Pne.sum(2), self.received_Pne.sum(2)]).transpose(1, 2)

    def on_host(self) -> tuple[list[list[int]], list[list[int]]]:
        """Rows to send to, and to receive from, each rank: two lists, both [chunk][rank]."""
        if self._copy is None:
            self._work.wait()
            send, receive = self._sums().tolist()
        else:
            copy, copied = self._copy
            copied.synchronize()
            send, receive = copy.tolist()
        return send, receive


class AllToAll:
    """One differentiable all-to-all of tensors whose first dimension is rows: `send[p]` of them to rank p of `ep`,
    `receive[p]` from it."""

    def __init__(self, ep: ExpertParallel, send: list[int], receive: list[int]) -> None:
        self.ep, self.send, self.receive = ep, send, receive
        self._in_flight: list[tuple[Tensor, Tensor, dist.Work]] = []  # tensors being sent are kept alive here

    def start(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Send the tensors off (collective). Nothing but `wait` may read the results."""
        return _Start.apply(self, *tensors)

    def wait(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Wait for the tensors that `start` returned; what this returns has arrived."""
        return _Wait.apply(self, *tensors)

    def reverse(self) -> AllToAll:
        """The all-to-all that brings as many rows back."""
        return AllToAll(self.ep, self.receive, self.send)

    def launch(self, tensors: tuple[Tensor, ...], send: list[int], receive: list[int]) -> tuple[Tensor, ...]:
        """`start` without a gradient; the sizes may be those of the way back."""
        packed = [tensor.contiguous() for tensor in tensors]
        self._in_flight = [(tensor, *self.ep.all_to_all(tensor, send, receive)) for tensor in packed]
        return tuple(arriving for _, arriving, _ in self._in_flight)

    def complete(self) -> tuple[Tensor, ...]:
        """`wait` without a gradient, for what `launch` started."""
        in_flight, self._in_flight = self._in_flight, []
        for _, _, work in in_flight:
            work.wait()
        return tuple(arrived for _, arrived, _ in in_flight)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, all_to_all: AllToAll, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.all_to_all = all_to_all
        return all_to_all.launch(tensors, all_to_all.send, all_to_all.receive)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """`grads` are the placeholders that `_Wait.backward` returned; the real gradients are in flight since then."""
        return None, *ctx.all_to_all.complete()


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, all_to_all: AllToAll, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.all_to_all = all_to_all
        return tuple(arrived.view_as(arrived) for arrived in all_to_all.complete())

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Send the gradients off, and return tensors of the shapes that autograd checks.

        Autograd fills in zeros for an output that nothing used, so every rank takes part in every all-to-all.
        """
        ctx.all_to_all.launch(grads, ctx.all_to_all.receive, ctx.all_to_all.send)
        return None, *grads
