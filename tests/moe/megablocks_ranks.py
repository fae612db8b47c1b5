"""Ranks of test_megablocks: experts spread over ranks, with backend megablocks, against all of them in `reference`."""

import torch
import torch.distributed as dist

from ds_moe.engine.start import start_distributed
from ds_moe.moe.all_to_all import ExpertParallel
from ds_moe.moe.dispatch import AllToAllDispatcher, LocalDispatcher
from tests.distributed.dispatch_ranks import Case, D, E, build, run
from tests.launcher import leave, report
from tests.moe.megablocks_cases import difference, launches

CASES = {
    "uniform": Case(2, lambda rank: 5 + rank),
    "k = E": Case(E, lambda rank: 2),
    "one token": Case(1, lambda rank: 1),
    "a rank without rows": Case(1, lambda rank: 4, attract=True),
    "a rank of padding, chunks": Case(2, lambda rank: 4, lambda rank: torch.full((4,), rank != 1), chunks=2),
}


def inputs(case, rank):
    generator = torch.Generator().manual_seed(100 + rank)
    x_TD, direction_TD = (torch.randn(case.tokens(rank), D, generator=generator) for _ in range(2))
    return x_TD.abs() if case.attract else x_TD, direction_TD, case.real(rank).view(1, -1) if case.real else None


def compare(case, world_size, rank):
    ep = ExpertParallel(world_size, rank, dist.group.WORLD)
    sharded = build(case, AllToAllDispatcher(ep, "megablocks", chunks=case.chunks), ep.owned(E))
    sharded.experts.backend = "megablocks"
    whole = build(case, LocalDispatcher("reference"), slice(None))
    whole.experts.backend = "reference"
    for other in range(world_size):  # gradients of all ranks add up in its experts
        expected = run(whole, *inputs(case, other))
        if other == rank:
            expected_here = expected
    received = []
    forward = sharded.experts.forward
    sharded.experts.forward = lambda rows_RD, *rest: received.append(rows_RD.shape[0]) or forward(rows_RD, *rest)
    with launches() as seen:
        ours = run(sharded, *inputs(case, rank))
    pairs = [*zip(ours, expected_here, strict=True)]
    for name, parameter in sharded.experts.named_parameters():
        pairs.append((parameter.grad, getattr(whole.experts, name).grad[ep.owned(E)]))
    return {"difference": max(difference(*pair) for pair in pairs), "received": received, "launches": len(seen)}


def main():
    topology = start_distributed(1)
    for name, case in CASES.items():
        report(**{name: compare(case, topology.world_size, topology.rank)})
    leave()


if __name__ == "__main__":
    main()
