"""A packed run, stopped in the middle of an epoch: it goes on bit for bit, and on other ranks with the same samples."""

import json

import pytest

from ds_moe.data.digits import write_digits
from tests.distributed.test_resume import DRIFT, bit_equal, checkpoints, differences, position, tensors
from tests.launcher import run_ranks

RECORDS = 84  # seven steps an epoch: the checkpoint is that of the fourth
LAST, MIDDLE = "step_00000012", "step_00000004"


def launch(world_size, cases):
    return run_ranks("tests/distributed/resume_ranks.py", world_size, [json.dumps(cases), "tests/runs/packed.yaml"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    train, held_out = write_digits(tmp_path_factory.mktemp("digits"))
    for file, count in ((train, RECORDS), (held_out, 7)):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:count]))
    return [f"data.train={train}", f"data.eval={held_out}"]


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory, data):
    """Output folder of the run; beside it `again`, which resumed from its checkpoint in the middle, and the same two of
    streamed data."""
    folder = tmp_path_factory.mktemp("packed")
    output, again = folder / "run", folder / "again"
    resume = f"train.resume={checkpoints(output)}/{MIDDLE}"
    cases = [["never stopped", [*data, f"train.output_dir={output}"], "train"]]
    cases.append(["again", [*data, f"train.output_dir={again}", resume, "data.num_workers=1"], "train"])
    streamed, on = folder / "streamed", [*data, "data.streaming=true"]
    resume = f"train.resume={checkpoints(streamed)}/{MIDDLE}"
    cases.append(["streamed", [*on, f"train.output_dir={streamed}"], "train"])
    cases.append(["streamed again", [*on, f"train.output_dir={folder}/streamed again", resume], "train"])
    launched = launch(2, cases)
    assert f"data      streamed: 0.0 MB in 1 file, about {RECORDS} records, by 1 of 1 blocks" in launched.output
    assert "packing   " in launched.output and "rows a step" in launched.output
    return output


def test_resumed_in_the_middle_of_an_epoch_equals_never_stopped_bit_for_bit(never_stopped):
    ours, theirs = checkpoints(never_stopped.parent / "again") / LAST, checkpoints(never_stopped) / LAST
    assert bit_equal(tensors(ours), tensors(theirs))
    assert position(ours) == position(theirs)
    assert position(ours)["data.packing"] and position(checkpoints(never_stopped) / MIDDLE)["step"] == 4
    results = [
        json.loads((output / "result.json").read_text()) for output in (never_stopped, never_stopped.parent / "again")
    ]
    assert results[0]["eval_loss"] == results[1]["eval_loss"] and "mean" in results[0]["accuracy"]


def test_a_streamed_run_too(never_stopped):
    ours, theirs = (checkpoints(never_stopped.parent / name) / LAST for name in ("streamed again", "streamed"))
    assert bit_equal(tensors(ours), tensors(theirs)) and position(ours) == position(theirs)
    assert position(ours)["data.streaming"] and position(ours)["step"] == 12
    assert not bit_equal(tensors(ours), tensors(checkpoints(never_stopped) / LAST))  # in another order


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [3, 1])
def test_another_number_of_ranks_goes_on_with_the_same_samples(never_stopped, data, tmp_path, world_size, show):
    """In other rows, with an aux loss over samples: what is trained differs by fp32 sums in another order."""
    resume = f"train.resume={checkpoints(never_stopped)}/{MIDDLE}"
    launch(world_size, [["other", [*data, f"train.output_dir={tmp_path}", resume, "moe.ep_size=1"], "train"]])
    ours, theirs = checkpoints(tmp_path) / LAST, checkpoints(never_stopped) / LAST
    drift = [differences(tensors(ours), tensors(theirs), kind) for kind in ("weight/", "exp_avg/", "exp_avg_sq/")]
    show(f"packed, 2 ranks -> {world_size}: weights {drift[0]:.1e}, Adam's moments {drift[1]:.1e} and {drift[2]:.1e}")
    assert max(drift) <= DRIFT and position(ours) == position(theirs)
    losses = [json.loads((output / "result.json").read_text())["eval_loss"] for output in (tmp_path, never_stopped)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
