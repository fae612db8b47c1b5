"""Ranks of test_dispatch: the all-to-all dispatcher against all experts on one rank, for each case of `CASES`."""

import copy

import torch
import torch.distributed as dist

from ds_moe.engine import start_distributed
from ds_moe.moe import (
    AllToAllDispatcher,
    ExpertParallel,
    Experts,
    ForwardContext,
    LocalDispatcher,
    MoELayer,
    TopKRouter,
)
from tests.launcher import leave, report

D, F, E = 24, 40, 8
CASES = {  # name -> (top_k, tokens of a rank, which tokens are real, whether one expert attracts all, dtype)
    "uniform": (2, lambda rank: 11 + rank, None, False, torch.float32),
    "k = E": (E, lambda rank: 5, None, False, torch.float32),
    "one token": (1, lambda rank: 1, None, False, torch.float32),
    "all to one rank": (1, lambda rank: 9, None, True, torch.float32),
    "a rank of padding": (2, lambda rank: 7, lambda rank: torch.full((7,), rank != 1), False, torch.float32),
    "bf16": (2, lambda rank: 13, None, False, torch.bfloat16),
}


def build(top_k, dispatcher, attract, dtype, owned):
    generator = torch.Generator().manual_seed(3)
    gate = torch.randn(E, D, generator=generator) * 0.3
    gate_up, down = (torch.randn(E, *shape, generator=generator) * 0.3 for shape in ((2 * F, D), (D, F)))
    if attract:
        gate[5] = 40.0
    weights = [torch.nn.Parameter(tensor.to(dtype)) for tensor in (gate, gate_up[owned], down[owned])]
    experts = Experts(weights[1], weights[2], torch.nn.functional.silu)
    return MoELayer(TopKRouter(weights[0], top_k), experts, dispatcher, ForwardContext(), index=0)


def run(layer, x_TD, direction_TD, real_T):
    x_TD = x_TD.clone().requires_grad_()
    layer.context.begin(real_T, None)
    y_TD = layer(x_TD.unsqueeze(0))[0]
    (y_TD * direction_TD).sum().backward()
    return y_TD.detach(), x_TD.grad


def compare(name, world_size, rank):
    top_k, count, real, attract, dtype = CASES[name]
    inputs = []
    for other in range(world_size):
        generator = torch.Generator().manual_seed(100 + other)
        x_TD, direction_TD = (torch.randn(count(other), D, generator=generator) for _ in range(2))
        x_TD = x_TD.abs() if attract else x_TD
        inputs.append((x_TD.to(dtype), direction_TD.to(dtype), real(other).view(1, -1) if real else None))
    ep = ExpertParallel(world_size, rank, dist.group.WORLD)
    sharded = build(top_k, AllToAllDispatcher(ep), attract, dtype, ep.owned(E))
    whole = build(top_k, LocalDispatcher(), attract, dtype, slice(None))
    outputs = [run(copy.deepcopy(whole) if other != rank else whole, *inputs[other]) for other in range(world_size)]
    everyone = build(top_k, LocalDispatcher(), attract, dtype, slice(None))
    for other in range(world_size):
        run(everyone, *inputs[other])  # gradients of all ranks add up in its experts
    y_TD, x_grad = run(sharded, *inputs[rank])
    pairs = [(y_TD, outputs[rank][0]), (x_grad, outputs[rank][1])]
    for ours, theirs in zip(sharded.experts.parameters(), everyone.experts.parameters(), strict=True):
        pairs.append((ours.grad, theirs.grad[ep.owned(E)]))
    differences = [(ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6) for ours, theirs in pairs]
    received = sharded.dispatcher.plan(sharded.gate(inputs[rank][0])).counts_e.sum()
    return [value.float().item() for value in differences], int(received)


def main():
    topology = start_distributed(1)
    rank, world_size = topology.rank, topology.world_size
    for name in CASES:
        differences, received = compare(name, world_size, rank)
        report(**{name: {"differences": differences, "received": received}})
    leave()


if __name__ == "__main__":
    main()
