"""Pairs over ranks come to what their sequences come to alone; real images, fp32."""

import pytest

from tests.launcher import run_ranks

RANKS = "tests/distributed/dpo_ranks.py"
LOSS, GRADIENT = 1e-6, 5e-6  # the invariant: fp32 sums in another order
FIGURES = 1e-5  # of rewards and margins, differences of log-probs of about 20
CONTROLS = ("leak", "swapped", "wrong reference")
COLUMNS = ("loss", "aux", "figures", "gradient", "counts")


def test_pairs_are_their_sequences_alone(show):
    check(run_ranks(RANKS, 2, ["few"]), 2, ["swapped"], show)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_matrix_of_pairs(world_size, show):
    """Every loss x EP x ZeRO x packed or padded, checkpointing in every other one."""
    check(run_ranks(RANKS, world_size, ["all"]), 6 * {2: 2, 3: 1}[world_size] * 2 * 2, CONTROLS, show)


def check(run, count, controls, show):
    rows, losses = run.json["rows"], run.json["losses"]
    assert len(rows) == count and all(abs(loss) > 1e-3 for loss in losses.values())
    worst = dict(zip(COLUMNS, (max(row[place] for row in rows) for place in range(5, 10)), strict=True))
    show("largest differences: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))
    for name, *case, loss, aux, figures, gradient, counts in rows:
        assert loss <= LOSS * max(1.0, losses[name]) and aux <= LOSS, (name, case, loss, aux)
        assert gradient <= GRADIENT and figures <= FIGURES and counts == 0, (name, case, gradient, figures, counts)
    for control in controls:
        found = dict(zip(COLUMNS, run.json[control], strict=True))
        assert found["loss"] > LOSS and found["gradient"] > GRADIENT, (control, found)
