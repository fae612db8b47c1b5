"""The converted, sharded, partitioned model against the unconverted one, with real images, fp32.

One rank has no image at all: its dummy vision pass must neither hang the others nor change a gradient.
"""

import pytest

from tests.launcher import run_ranks

LOSS, GRADIENT = 1e-6, 5e-6  # the invariant: fp32 sums in another order


def test_parity(show):
    matrix(2, "few", 6, {"experts": 1, "towers": 2, "unlabelled": 1}, show)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "rows"), [(2, 12), (4, 18)])
def test_parity_matrix(world_size, rows, show):
    matrix(world_size, "all", rows, {"experts": 4, "towers": 7, "unlabelled": 3}, show)


def matrix(world_size, cases, rows, others, show):
    run = run_ranks("tests/distributed/parity_ranks.py", world_size, [cases])
    title = f"parity with unconverted transformers, {world_size} ranks, real images (one rank without), fp32"
    check_parity(run, title, rows, show)  # negative control: one layer's experts changed
    for kind, many in others.items():  # unlabelled: rank 0 alone has labels
        for name, (loss, gradient) in run.json[kind].items():
            assert loss <= LOSS and gradient <= GRADIENT, name
        assert len(run.json[kind]) == many


def check_parity(run, title, rows, show):
    """Every row that the ranks report keeps within the limits, and what they broke on purpose does not."""
    lines = [
        f"{title}, loss {run.json['reference_loss']:.4f}",
        "  EP  ZeRO  checkpointing   loss difference   gradient difference / largest entry",
    ]
    for ep_size, stage, checkpointing, loss, gradient in run.json["rows"]:
        lines.append(
            f"  {ep_size:>2}  {stage:>4}  {'on' if checkpointing else 'off':>13}   {loss:15.1e}   {gradient:19.1e}"
        )
    show("\n".join(lines))
    assert len(run.json["rows"]) == rows
    for row in run.json["rows"]:
        assert row[3] <= LOSS and row[4] <= GRADIENT, row
    broken_loss, broken_gradient = run.json["broken"]
    assert broken_loss > LOSS and broken_gradient > GRADIENT
