"""What the benchmark measures of one layer: its results, its time, and the memory its backward waits for."""

import dataclasses
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

from tools.bench.layer.block import Block

SLOW = 8  # times the quickest contender's time: fewer repetitions then


def forward_backward(block: Block, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """The output, and the gradients of half its sum of squares in the input and every parameter."""
    y = block.run(x)
    return y.detach(), torch.autograd.grad(y, [x, *block.parameters], y.detach())


def results(block: Block, x: Tensor) -> list[Tensor]:
    """Output and gradients (input, router, gate and up, down), in transformers' layout."""
    y, (grad_x, *grads) = forward_backward(block, x)
    return [y, grad_x, *block.as_weights(grads)]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest one, relative to the largest value of its tensor; NaN if any is."""
    pairs = zip(found, expected, strict=True)
    worst = [(ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30) for ours, theirs in pairs]
    return torch.stack(worst).max().item()


def seconds(run: Callable[[], object], device: str) -> float:
    if device == "cpu":
        began_s = time.perf_counter()
        run()
        return time.perf_counter() - began_s
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3


def interleaved(
    runs: dict[str, tuple[Block, Tensor]], device: str, repeats: int, apart: Collection[str] = ()
) -> dict[str, list[float]]:
    """Seconds of each repetition of each, in turns, so that a busy machine slows all alike.

    Every other round goes backwards, and the first one only warms up. One that then takes SLOW times the quickest's
    time sits out the last two thirds of the rounds; those `apart` are no measure of that, nor measured by it.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    rounds = dict.fromkeys(runs, repeats)
    for repeat in range(repeats + 1):
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            block, x = runs[name]
            if repeat <= rounds[name]:
                times[name].append(seconds(lambda block=block, x=x: forward_backward(block, x), device))
        if repeat == 0:
            warm_up = {name: taken.pop() for name, taken in times.items()}
            compared = {name: taken_s for name, taken_s in warm_up.items() if name not in apart}
            for name, taken_s in compared.items():
                if taken_s > SLOW * min(compared.values()):
                    rounds[name] = max(1, repeats // 3)
    return times


class _Kept:
    """A saved tensor; lives as long as the graph that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(block: Block, x: Tensor) -> int:
    """Bytes that stay for the backward after a forward, without the input's and the parameters'.

    Counted are the whole storages, each once, of what autograd saves (custom functions included) and of tensors that a
    custom function keeps on its `ctx` by hand.
    """
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        saved = _Kept(tensor.detach())
        kept.add(saved)
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved.tensor):
        y = block.run(x)
    tensors = [saved.tensor for saved in kept]
    for node in _nodes(y.grad_fn):
        tensors += _tensors(getattr(node, "__dict__", {}))
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *block.parameters)}
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for place, size in sizes.items() if place not in own)


def _nodes(root: Node | None) -> set[Node]:
    """The graph below `root`."""
    found: set[Node] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [below for below, _ in node.next_functions]
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(list(vars(value).values()))


def peak_bytes(block: Block, x: Tensor) -> int | None:
    """Most memory allocated at once in a forward and backward, above what was there before; None: not on CUDA."""
    if x.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward_backward(block, x)
    return torch.cuda.max_memory_allocated() - before


def memory_bandwidth(device: str) -> float:
    """Bytes read and written a second by a copy that no cache holds: the best of 6."""
    source = torch.ones(2**28 if device == "cuda" else 2**26, device=device)  # fp32
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device) for _ in range(6))
