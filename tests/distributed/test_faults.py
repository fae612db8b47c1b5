"""What goes wrong at night: signals, ranks that hang or die, NaNs, checkpoints that are still being written."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch

from ds_moe.checkpoint.files import Reader, newest_complete
from ds_moe.faults.watchdog import STALLED
from ds_moe.training.run import SKIPPED_STEPS
from tests.launcher import run_ranks, start_ranks

RUN = "tests/runs/faults.yaml"
EVALUATES = ["data.eval=digits", "train.eval_every=4", "train.eval_samples=8", "train.eval_generate=false"]
PATIENCE = [*EVALUATES[:1], EVALUATES[3], "train.eval_every=1", "train.patience=3"]
PATIENCE += ["checkpoint.every=null", "checkpoint.keep=1", "train.eval_batch_size=64"]
LONG = ["train.steps=4000", "checkpoint.every=null", "train.watchdog_s=10"]


def tensors(output: Path, step: int) -> dict[str, torch.Tensor]:
    reader = Reader(output / "checkpoints" / f"step_{step:08d}")
    return {key: reader.read(key) for key in reader.tensors}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def steps_taken(output: Path, step: int) -> int:
    return json.loads((output / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())["adam_step"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One launch of all cases: (output folder by case, what the ranks reported)."""
    folder = tmp_path_factory.mktemp("faults")
    zero = {stage: f"deepspeed=ds_configs/zero{stage}.json" for stage in (1, 2, 3)}
    cases = [
        ["sound", [], "nan loss", []],
        ["nan loss, ZeRO 3", [zero[3]], "nan loss", [4]],
        ["nan loss, ZeRO 1", [zero[1]], "nan loss", [4]],
        ["nan loss, ZeRO 2, no clipping", [zero[2], "train.max_grad_norm=0"], "nan loss", [4]],
        ["nan gradient, ZeRO 3", [zero[3]], "nan gradient", [4]],
        ["nan gradient, ZeRO 1", [zero[1]], "nan gradient", [4]],
        ["infinite loss", [], "infinite loss", [4]],
        ["bf16", ["train.precision=bf16"], "nan gradient", [4]],
        ["too many", ["train.max_skipped=1"], "nan loss", [4, 5]],
        ["not in a row", ["train.max_skipped=1"], "nan loss", [4, 6]],
        ["background", ["checkpoint.background=true"], "slow writes", []],
        ["evaluation", EVALUATES, "signal in evaluation", []],
        ["interrupted evaluation", EVALUATES, "signal in evaluation", [4, 8]],
        ["patience", PATIENCE, "worse evaluations", []],
        ["interrupted patience", PATIENCE, "worse evaluations", [3]],
    ]
    outputs = {name: folder / name.replace(" ", "_") for name, *_ in cases}
    placed = [[name, [*more, f"train.output_dir={outputs[name]}"], *rest] for name, more, *rest in cases]
    run = run_ranks("tests/distributed/faults_ranks.py", 2, [json.dumps(placed)])
    return outputs, run


SKIPPING = [
    "nan loss, ZeRO 3",
    "nan loss, ZeRO 1",
    "nan loss, ZeRO 2, no clipping",
    "nan gradient, ZeRO 3",
    "nan gradient, ZeRO 1",
    "infinite loss",
    "bf16",
]


@pytest.mark.slow
@pytest.mark.parametrize("case", SKIPPING)
def test_a_step_with_a_nan_on_one_rank_is_taken_by_none(ran, case):
    """Step 4 leaves weights, moments and biases as step 3 made them; the data and the schedule go on."""
    outputs, run = ran
    output = outputs[case]
    before, after = tensors(output, 3), tensors(output, 4)
    assert same(before, after)
    assert any(key.startswith("buffer/") and "bias_E" in key for key in before)
    assert not same(after, tensors(output, 5))
    assert steps_taken(output, 8) == 7
    assert all(value.isfinite().all() for value in tensors(output, 8).values())
    assert run.json_by_rank[0][case]["step"] == run.json_by_rank[1][case]["step"] == 8


@pytest.mark.slow
def test_without_a_nan_every_step_is_taken(ran):
    outputs, _ = ran
    assert not same(tensors(outputs["sound"], 3), tensors(outputs["sound"], 4))
    assert not (outputs["sound"] / SKIPPED_STEPS).exists()


@pytest.mark.slow
def test_a_bias_is_moved_by_the_steps_that_are_taken_alone(ran):
    """Each update by the assignments of its own step: those of the skipped fourth are in none."""
    _, run = ran
    every_step, taken = (run.json[f"{case}: assignments"] for case in ("sound", "nan loss, ZeRO 3"))
    layers = 2
    assert len(every_step) == 8 * layers and all(every_step)
    assert taken == every_step[: 3 * layers] + every_step[4 * layers :]


@pytest.mark.slow
def test_the_schedule_does_not_wait_for_a_skipped_step(ran):
    """Rank 0's log: the learning rate of a run that skipped a step is that of one that did not, step for step."""
    _, run = ran
    rates = [line.split("  lr ")[1].split()[0] for line in run.log(0).splitlines() if "  lr " in line]
    assert len(rates) > 16 and rates[8:16] == rates[:8]


@pytest.mark.slow
def test_the_samples_of_a_skipped_step_are_written_down_by_rank(ran):
    outputs, run = ran
    [line] = (outputs["nan loss, ZeRO 3"] / SKIPPED_STEPS).read_text().splitlines()
    skipped = json.loads(line)
    assert skipped["step"] == 4
    assert [rank["loss"] == "nan" for rank in skipped["ranks"]] == [False, True]
    samples = [where for rank in skipped["ranks"] for where in rank["samples"]]
    assert len(samples) == len(set(samples)) == 8
    assert [len(rank["samples"]) for rank in skipped["ranks"]] == [4, 4]
    assert "steps not taken" in run.log(0)


@pytest.mark.slow
def test_more_in_a_row_than_allowed_end_the_run_and_its_checkpoints_stay(ran):
    outputs, run = ran
    for of_rank in run.json_by_rank:
        assert "steps 4 to 5: a NaN or infinite loss or gradient in each" in of_rank["too many"]
        assert "train.max_skipped 1" in of_rank["too many"]
    assert newest_complete(outputs["too many"] / "checkpoints").name == "step_00000004"
    assert run.json["not in a row"]["step"] == 8


@pytest.mark.slow
def test_checkpoints_in_the_background_hold_the_same(ran):
    """Each file takes longer than a step, so the next steps have moved every weight when it is written."""
    outputs, _ = ran
    for step in range(1, 9):
        assert same(tensors(outputs["background"], step), tensors(outputs["sound"], step)), step


@pytest.mark.slow
def test_a_signal_in_an_evaluation_puts_it_off_until_the_run_goes_on(ran):
    outputs, run = ran
    stops, result = run.json["interrupted evaluation"]
    assert stops == [[4, 128 + signal.SIGUSR1], [8, 128 + signal.SIGUSR1]]
    _, undisturbed = run.json["evaluation"]
    assert result["eval_loss"] == undisturbed["eval_loss"] and result["step"] == 8
    assert same(tensors(outputs["interrupted evaluation"], 8), tensors(outputs["sound"], 8))


@pytest.mark.slow
def test_a_run_that_was_stopped_waits_on_for_a_better_evaluation_and_keeps_the_best(ran):
    """The best one is the first. The checkpoint of the stop neither takes its place nor stays behind it."""
    outputs, run = ran
    stops, result = run.json["interrupted patience"]
    _, undisturbed = run.json["patience"]
    assert stops == [[3, 128 + signal.SIGUSR1]] and result["step"] == undisturbed["step"] == 1
    for name, found in (("patience", undisturbed), ("interrupted patience", result)):
        folder = outputs[name] / "checkpoints"
        assert [path.name for path in folder.glob("step_*")] == ["step_00000001"]
        assert json.loads((folder / "latest").read_text()) == "step_00000001" == Path(found["checkpoint"]).name
        assert same(tensors(outputs[name], 1), tensors(outputs["sound"], 1))
    assert run.log(0).count("step 4: 3 evaluations without a better one") == 2


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_with_a_checkpoint_and_the_run_goes_on_bit_for_bit(ran, tmp_path):
    outputs, _ = ran
    slow = "data.num_workers=1"  # a worker that the launcher's signals must not kill before its rank has saved
    arguments = [RUN, f"train.output_dir={tmp_path}", "checkpoint.every=null", slow]
    run = start_ranks("ds_moe.train", 2, arguments, launcher="deepspeed")
    run.wait_for(" 3/8  loss")
    run.kill(rank=1, with_signal=signal.SIGTERM)
    assert run.wait() != 0
    stopped = newest_complete(tmp_path / "checkpoints")
    assert stopped is not None and stopped.name != "step_00000008"
    step = int(stopped.name.removeprefix("step_"))
    assert same(tensors(tmp_path, step), tensors(outputs["sound"], step))
    assert "rank 1: received SIGTERM in step" in run.output
    run_ranks("ds_moe.train", 2, arguments)
    assert same(tensors(tmp_path, 8), tensors(outputs["sound"], 8))


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job_in_time_and_is_named(tmp_path):
    run = start_ranks("ds_moe.train", 2, [RUN, f"train.output_dir={tmp_path}", *LONG])
    run.wait_for("  3/4000  loss")
    began = time.monotonic()
    run.kill(rank=1, with_signal=signal.SIGSTOP)
    run.wait_for("watchdog: rank 1 has not been heard of for")
    assert time.monotonic() - began < 6 * 10  # the limit, and what a busy machine takes
    time.sleep(1.0)
    run.kill(rank=1, with_signal=signal.SIGCONT)  # torchrun would wait half a minute before it kills it
    assert run.wait() != 0
    assert f"exitcode  : {STALLED}" in run.output
    assert "last in step" in run.log(0) and "train_step" in run.log(0)  # where it was, and the stack of who waited
