"""Experts spread over real processes equal experts on one: outputs, input gradients, expert gradients."""

import pytest

from tests.distributed.dispatch_ranks import CASES
from tests.launcher import run_ranks


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_to_all_equals_local(world_size):
    run = run_ranks("tests/distributed/dispatch_ranks.py", world_size, timeout=120)
    for name in CASES:
        for rank, results in enumerate(run.json_by_rank):
            # Relative to the tensor's largest entry: sums in another order, some units in the last place.
            tolerance = 2**-6 if name == "bf16" else 2e-6
            assert max(results[name]["differences"]) <= tolerance, (name, rank, results[name])
    received = [results["all to one rank"]["received"] for results in run.json_by_rank]
    assert sorted(received)[:-1] == [0] * (world_size - 1), "the case with ranks that receive nothing has none"
