"""Experts spread over real processes equal experts on one: outputs, input gradients, expert gradients."""

import pytest

from tests.distributed.dispatch_ranks import CASES, D, E
from tests.launcher import run_ranks


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_all_to_all_equals_local(world_size):
    run = run_ranks("tests/distributed/dispatch_ranks.py", world_size)
    for name in CASES:
        for rank, results in enumerate(run.json_by_rank):
            # Relative to the tensor's largest entry: sums in another order, some units in the last place.
            tolerance = 2**-6 if name == "bf16" else 1e-6
            assert max(results[name]["differences"]) <= tolerance, (name, rank, results[name])
            if name != "a rank of padding":
                assert results[name]["sent_bytes"] == sent_bytes(CASES[name], results[name], world_size), (name, rank)
    received = [results["all to one rank"]["received"] for results in run.json_by_rank]
    assert sorted(received)[:-1] == [0] * (world_size - 1), "the case with ranks that receive nothing has none"


def sent_bytes(case, results, world_size):
    """Of a forward and backward: counts; rows out and in; their gradients in and out; the weights, if they travel."""
    rows = results["to_others"] + results["from_others"]
    counts = 8 * E // world_size * (world_size - 1)
    weights = 4 * rows if case.apply_weight == "after" else 0
    return counts + 2 * rows * D * case.dtype.itemsize + weights
