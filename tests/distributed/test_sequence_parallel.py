"""Rows that ranks share come to what whole rows come to: loss, gradients, counts; real images, fp32."""

import json

import pytest

from ds_moe.data.digits import write_digits
from tests.distributed.test_packed_run import LAST, MIDDLE, RECORDS
from tests.distributed.test_resume import DRIFT, bit_equal, checkpoints, differences, position, tensors
from tests.launcher import run_ranks

RANKS = "tests/distributed/sequence_parallel_ranks.py"
LOSS, GRADIENT = 1e-6, 5e-6  # the invariant: fp32 sums in another order
FIGURES = ("loss", "aux", "gradient", "held-out")
CONTROLS = ("local attention", "forgotten label", "turned features", "unshared counts")


def test_two_ranks_share_rows(show):
    """A case of each of two modes; a sample that changes moves no other."""
    check(run_ranks(RANKS, 2, [2, "few"]), 2, show)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "ranks"), [(2, 2), (4, 4), (4, 2)])
def test_the_matrix(world_size, ranks, show):
    """Every EP x ZeRO x checkpointing x mode; the last: two groups of two."""
    check(run_ranks(RANKS, world_size, [ranks, "all"]), 9, show)


def check(run, modes, show):
    rows, ranks = run.json["rows"], run.json["rows"][0][1]
    lines = [f"{run.nproc} ranks, {ranks} a row: largest difference to whole rows"]
    for name in dict.fromkeys(row[0] for row in rows):
        own = [row for row in rows if row[0] == name]
        worst = {figure: max(row[5 + place] for row in own) for place, figure in enumerate(FIGURES)}
        lines.append(f"  {name:<24}{len(own):>3} cases  " + "  ".join(f"{key} {one:.1e}" for key, one in worst.items()))
        assert all(worst[figure] <= (GRADIENT if figure == "gradient" else LOSS) for figure in FIGURES), (name, worst)
        assert not any(row[9] for row in own), name  # counts that move a loss-free bias are equal
    assert len({row[0] for row in rows}) == modes
    for control in CONTROLS if modes == 9 else ():
        loss, aux, gradient, *_ = run.json[control]
        lines.append(f"  {control + ' (control)':<36}loss {loss:.1e}  aux {aux:.1e}  gradient {gradient:.1e}")
        assert max(loss, aux) > LOSS and gradient > 10 * GRADIENT, control
    others, own = run.json["isolation, dense"]
    assert others == 0.0 < own
    if modes == 9:
        others, own = run.json["isolation, plain"]
        assert others <= 1e-6 < own
    assert run.json["leak"][0] > 1e-4
    show("\n".join(lines))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_a_row(tmp_path, show):
    """Ranks that shared rows resume bit for bit; with rows of their own they go on with the same samples."""
    train, held_out = write_digits(tmp_path / "digits")
    for file, count in ((train, RECORDS), (held_out, 7)):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:count]))
    data, shared = [f"data.train={train}", f"data.eval={held_out}"], "train.sequence_parallel=2"
    output, resume = tmp_path / "run", f"train.resume={checkpoints(tmp_path / 'run')}/{MIDDLE}"
    cases = [["never stopped", [*data, f"train.output_dir={output}", shared], "train"]]
    cases.append(["again", [*data, f"train.output_dir={tmp_path / 'again'}", shared, resume], "train"])
    cases.append(["whole rows", [*data, f"train.output_dir={tmp_path / 'whole'}", resume], "train"])
    run = run_ranks("tests/distributed/resume_ranks.py", 2, [json.dumps(cases), "tests/runs/packed.yaml"])
    assert "2 ranks share each row, 1 rows at a time" in run.output
    final, again, whole = (checkpoints(tmp_path / name) / LAST for name in ("run", "again", "whole"))
    assert bit_equal(tensors(again), tensors(final))
    drift = [differences(tensors(whole), tensors(final), kind) for kind in ("weight/", "exp_avg/", "exp_avg_sq/")]
    show(f"2 ranks a row -> whole rows: weights {drift[0]:.1e}, Adam's moments {drift[1]:.1e} and {drift[2]:.1e}")
    assert max(drift) <= DRIFT and position(whole) == position(again) == position(final)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("run", "again", "whole")]
    losses = [result["eval_loss"] for result in results]
    assert losses[0] == losses[1] and losses[2] == pytest.approx(losses[0], abs=1e-5)
    assert "mean" in results[0]["accuracy"]
