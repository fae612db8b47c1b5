"""Packed rows come to what their samples come to alone: each loss, gradients, counts; real images, fp32."""

import pytest

from tests.launcher import run_ranks

RANKS = "tests/distributed/packing_ranks.py"
LOSS, GRADIENT = 1e-6, 5e-6  # the invariant: fp32 sums in another order
COLUMNS = ("train", "eval", "total", "aux", "gradient", "counts")


def test_packed_rows_are_their_samples_alone(show):
    """A case or two of each mode."""
    check(run_ranks(RANKS, 2, ["few"]), 6, show)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_matrix(world_size, show):
    """Every EP x ZeRO x checkpointing x mode."""
    check(run_ranks(RANKS, world_size, ["all"]), 6 * {2: 2, 3: 1, 4: 3}[world_size] * 6, show)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_policies_on_packed_rows(world_size, show):
    """Every EP x ZeRO x checkpointing x objective, under replayed routing and an old policy."""
    run = run_ranks("tests/distributed/packing_rl_ranks.py", world_size, ["all"])
    worst = {name: max(max(row[4:]) for row in run.json["rows"] if row[0] == name) for name in run.json["losses"]}
    show(f"policies on packed rows, {world_size} ranks, largest differences: {worst}")
    assert len(run.json["rows"]) == 4 * {2: 2, 3: 1, 4: 3}[world_size] * 6
    assert all(abs(loss) > 1e-3 for loss in run.json["losses"].values())
    for name, *case, loss, gradient in run.json["rows"]:
        assert loss <= LOSS and gradient <= GRADIENT, (name, case)
    loss, gradient = run.json["broken"]  # each completion has another's advantage
    assert loss > LOSS and gradient > GRADIENT


def check(run, count, show):
    lines = [
        f"packed against every sample alone, {run.nproc} ranks, real images (one rank without), fp32; differences",
        f"  {'mode':22} EP  ZeRO  checkpointing   sample, train   sample, eval      step       aux  gradient",
    ]
    for name, ep_size, stage, checkpointing, *found in run.json["rows"]:
        figures = "   ".join(f"{one:10.1e}" for one in found[:-1])
        lines.append(f"  {name:22} {ep_size:>2}  {stage:>4}  {'on' if checkpointing else 'off':>13}   {figures}")
    show("\n".join(lines))
    assert len(run.json["rows"]) == count
    for name, *case, train, evaluated, total, aux, gradient, counts in run.json["rows"]:
        assert max(train, evaluated, total, aux) <= LOSS and gradient <= GRADIENT and counts == 0, (name, case)
    for control in ("leak", "wrong rope row"):
        found = dict(zip(COLUMNS, run.json[control], strict=True))
        assert min(found["train"], found["eval"]) > LOSS and found["gradient"] > GRADIENT, control
    miscounted = dict(zip(COLUMNS, run.json["miscounted"], strict=True))
    assert miscounted["aux"] > LOSS and miscounted["gradient"] > GRADIENT
