"""Runs liger-kernel's fused experts in Triton's interpreter and reports how far they are from float64.

    python -m tests.moe.liger_cases [slow]

Each case takes the interpreter two seconds, so that only a few are not slow.
"""

import sys
from typing import NamedTuple

import torch

from ds_moe.moe.backends.liger import Liger
from ds_moe.moe.backends.reference import Reference
from ds_moe.moe.context import ForwardContext
from ds_moe.moe.dispatch import LocalDispatcher
from ds_moe.moe.experts import Experts
from ds_moe.moe.layer import MoELayer
from ds_moe.moe.parts import make_router
from tests.launcher import report

D, WIDTH = 24, 72  # a width of two blocks


class Case(NamedTuple):
    counts: list[int]
    dtype: torch.dtype = torch.float32
    weighted: bool = True


CASES = {
    "uneven": Case([1, 0, 9, 3]),
    "no rows": Case([0, 0, 0, 0]),
}
SLOW = {
    "more than a block of rows": Case([0, 70, 1, 0], weighted=False),
    "one row of one expert": Case([1]),
    "no rows, unweighted": Case([0, 0], weighted=False),
    "float64": Case([1, 0, 9, 3], torch.float64),
    "fp16": Case([2, 0, 3], torch.float16),
    "even": Case([4, 4, 4, 4], weighted=False),
    "uneven, unweighted": Case([1, 0, 9, 3], weighted=False),
    "more than a block of rows, weighted": Case([0, 70, 1, 0]),
    "all to the last": Case([0, 0, 0, 7]),
    "many experts": Case([i % 3 for i in range(40)]),
    "one expert": Case([5], weighted=False),
}


def inputs(case):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator) * std).to(case.dtype)

    rows, experts = sum(case.counts), len(case.counts)
    weights = normal(experts, 2 * WIDTH, D, std=0.3), normal(experts, D, WIDTH, std=0.3)
    weight_R = torch.rand(rows, generator=generator, dtype=torch.promote_types(case.dtype, torch.float32))
    return [normal(rows, D), *weights, weight_R], normal(rows, D)


def results(backend, case, tensors, direction_RD):
    """The output and the gradients."""
    rows, gate_up, down, weight_R = (tensor.clone().requires_grad_() for tensor in tensors)
    wanted = [rows, gate_up, down] + [weight_R] * case.weighted
    y = backend.swiglu(rows, gate_up, down, torch.tensor(case.counts), weight_R if case.weighted else None, "act")
    return y.detach(), *torch.autograd.grad(y, wanted, direction_RD)


def difference(ours, theirs):
    """Relative to each tensor's largest entry."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.numel()]
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-6)).item() for a, b in pairs)


def compare(case, wrong=False):
    tensors, direction_RD = inputs(case)
    ours = results(Liger(), case, tensors, direction_RD)
    assert ours[0].dtype == ours[1].dtype == case.dtype and ours[-1].dtype == tensors[3 if case.weighted else 2].dtype
    wide = [tensor.double() for tensor in tensors]
    found = {"difference": difference(ours, results(Reference(), case, wide, direction_RD.double()))}
    if wrong:  # two experts exchanged
        wide[1] = wide[1].roll(1, dims=0)
        found["wrong"] = difference(ours, results(Reference(), case, wide, direction_RD.double()))
    return found


def layer():
    """A whole layer, forward and backward."""
    E, outputs = 6, []
    for backend in ("liger", "reference"):
        torch.manual_seed(0)
        shapes = (E, D), (E, 2 * WIDTH, D), (E, D, WIDTH)
        weights = [torch.nn.Parameter(torch.randn(*shape) * 0.3) for shape in shapes]
        experts, dispatcher = Experts(*weights[1:], backend), LocalDispatcher(backend)
        x = torch.randn(1, 7, D, requires_grad=True)
        y = MoELayer(make_router("topk", weights[0], 2), experts, dispatcher, ForwardContext(), index=0)(x)
        outputs.append((y.detach(), *torch.autograd.grad(y, [x, *weights], torch.randn_like(y))))
    return difference(*outputs)


def main():
    slow = sys.argv[1:] == ["slow"]
    report(cases={name: compare(case, name == "uneven") for name, case in (SLOW if slow else CASES).items()})
    if slow:
        report(layer=layer())


if __name__ == "__main__":
    main()
