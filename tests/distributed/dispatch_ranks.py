"""Ranks of test_dispatch: the all-to-all dispatcher against all experts on one rank, for each case of `CASES`."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from ds_moe.engine.start import start_distributed
from ds_moe.moe.all_to_all import ExpertParallel
from ds_moe.moe.context import ForwardContext
from ds_moe.moe.dispatch import AllToAllDispatcher, LocalDispatcher
from ds_moe.moe.experts import Experts
from ds_moe.moe.layer import MoELayer
from ds_moe.moe.parts import make_router
from tests.launcher import leave, report

D, F, E = 24, 40, 8


class Case(NamedTuple):
    top_k: int
    tokens: Callable[[int], int]  # of a rank
    real: Callable[[int], torch.Tensor] | None = None  # which tokens of a rank are no padding; None: all
    attract: bool = False  # one expert attracts all tokens
    dtype: torch.dtype = torch.float32
    chunks: int = 1
    apply_weight: str = "after"
    shared: bool = False  # an expert that every token passes, computed while rows travel


CASES = {
    "uniform": Case(2, lambda rank: 11 + rank),
    "k = E": Case(E, lambda rank: 5),
    "one token": Case(1, lambda rank: 1),
    "all to one rank": Case(1, lambda rank: 9, attract=True),
    "a rank of padding": Case(2, lambda rank: 7, lambda rank: torch.full((7,), rank != 1)),
    "bf16": Case(2, lambda rank: 13, dtype=torch.bfloat16),
    "weights before": Case(2, lambda rank: 11 + rank, apply_weight="before"),
    "chunks": Case(2, lambda rank: 11 + rank, chunks=2, shared=True),
    "chunks without rows": Case(1, lambda rank: 9, attract=True, chunks=2),
    "chunks, weights before": Case(3, lambda rank: 6, chunks=2, apply_weight="before"),
}


def build(case, dispatcher, owned):
    generator = torch.Generator().manual_seed(3)
    gate = torch.randn(E, D, generator=generator) * 0.3
    gate_up, down = (torch.randn(E, *shape, generator=generator) * 0.3 for shape in ((2 * F, D), (D, F)))
    if case.attract:
        gate[5] = 40.0
    weights = [torch.nn.Parameter(tensor.to(case.dtype)) for tensor in (gate, gate_up[owned], down[owned])]
    experts = Experts(weights[1], weights[2])
    shared = None
    if case.shared:
        torch.manual_seed(4)
        shared = torch.nn.Linear(D, D)
    router = make_router("topk", weights[0], case.top_k)
    return MoELayer(router, experts, dispatcher, ForwardContext(), index=0, shared=shared)


def run(layer, x_TD, direction_TD, real_T):
    x_TD = x_TD.clone().requires_grad_()
    layer.context.begin(real_T, None)
    y_TD = layer(x_TD.unsqueeze(0))[0]
    (y_TD * direction_TD).sum().backward()
    return y_TD.detach(), x_TD.grad


def compare(case, world_size, rank):
    inputs = []
    for other in range(world_size):
        generator = torch.Generator().manual_seed(100 + other)
        x_TD, direction_TD = (torch.randn(case.tokens(other), D, generator=generator) for _ in range(2))
        x_TD = x_TD.abs() if case.attract else x_TD
        real = case.real(other).view(1, -1) if case.real else None
        inputs.append((x_TD.to(case.dtype), direction_TD.to(case.dtype), real))
    ep = ExpertParallel(world_size, rank, dist.group.WORLD)
    sent = AllToAllDispatcher(ep, apply_weight=case.apply_weight, chunks=case.chunks)
    sharded = build(case, sent, ep.owned(E))
    whole = build(case, LocalDispatcher(apply_weight=case.apply_weight), slice(None))
    outputs = [run(copy.deepcopy(whole) if other != rank else whole, *inputs[other]) for other in range(world_size)]
    everyone = build(case, LocalDispatcher(apply_weight=case.apply_weight), slice(None))
    for other in range(world_size):
        run(everyone, *inputs[other])  # gradients of all ranks add up in its experts
    y_TD, x_grad = run(sharded, *inputs[rank])
    sent_bytes = ep.sent_bytes
    pairs = [(y_TD, outputs[rank][0]), (x_grad, outputs[rank][1])]
    for ours, theirs in zip(sharded.experts.parameters(), everyone.experts.parameters(), strict=True):
        pairs.append((ours.grad, theirs.grad[ep.owned(E)]))
    differences = [(ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6) for ours, theirs in pairs]
    plan = sharded.dispatcher.plan(sharded.gate(inputs[rank][0]))
    assert torch.equal(plan.counts_E, whole.dispatcher.plan(whole.gate(inputs[rank][0])).counts_E)
    send_nP, receive_nP = plan.row_counts.on_host()
    others = [
        sum(rows for rows_P in rows_nP for p, rows in enumerate(rows_P) if p != rank)
        for rows_nP in (send_nP, receive_nP)
    ]
    return {
        "differences": [value.float().item() for value in differences],
        "received": sum(map(sum, receive_nP)),
        "to_others": others[0],
        "from_others": others[1],
        "sent_bytes": sent_bytes,
    }


def main():
    topology = start_distributed(1)
    rank, world_size = topology.rank, topology.world_size
    for name, case in CASES.items():
        report(**{name: compare(case, world_size, rank)})
    leave()


if __name__ == "__main__":
    main()
