"""Whole runs of task dpo: stopped in the middle they go on bit for bit, over LoRA and with stored log-probs."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.test_resume import DRIFT, bit_equal, checkpoints, differences, position, tensors
from tests.launcher import run_ranks
from tools.demos.dpo.pairs import write_pairs

RUN = "tests/runs/dpo.yaml"
LAST, MIDDLE = "step_00000012", "step_00000008"
STORED = ["lora=null", "deepspeed=zero2"]
REPLAY = ["dpo.replay_reference=true", "train.gradient_checkpointing=false"]
REPLAY += ["data.packing=false", "train.tokens_per_micro_batch=null", "train.global_batch_size=6"]  # padded rows


def launch(world_size, cases):
    return run_ranks("tests/distributed/resume_ranks.py", world_size, [json.dumps(cases), RUN])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    train, held_out = write_pairs(folder, "train", 33), write_pairs(folder, "held-out", 11)
    return [f"data.train={train}", f"data.eval={held_out}", "train.eval_every=6"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """Output folders by name; those that end in "again" resumed from the middle of the other run."""
    folder, cases = tmp_path_factory.mktemp("runs"), []
    for name, words in {"base": [], "stored": STORED, "replay": REPLAY}.items():
        resume = f"train.resume={folder / name}/checkpoints/{MIDDLE}"
        words = [*data, *words, "monitor.tensorboard=true"]
        cases.append([name, [*words, f"train.output_dir={folder / name}"], "train"])
        cases.append([f"{name} again", [*words, f"train.output_dir={folder / name}_again", resume], "train"])
    # The second run has an output folder of its own, so it scores the reference anew, before it resumes.
    found = [f"train.output_dir={folder}/stored", f"dpo.reference_dir={folder}/stored_again/data_cache"]
    cases.append(["evaluated", [*data, *STORED, *found], "evaluate"])
    launch(2, cases)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "stored", "replay"])
def test_resumed_equals_never_stopped_bit_for_bit(runs, name):
    ours, theirs = (checkpoints(runs / f"{name}{again}") / LAST for again in ("_again", ""))
    assert bit_equal(tensors(ours), tensors(theirs)) and position(ours) == position(theirs)
    results = [json.loads((runs / f"{name}{again}/result.json").read_text()) for again in ("", "_again")]
    assert results[0]["eval_loss"] == results[1]["eval_loss"] and results[0]["accuracy"] == results[1]["accuracy"]
    assert {"margin", "accuracy", "reward_chosen", "logp_rejected"} <= set(results[0]["dpo"])


@pytest.mark.slow
def test_the_board_has_rewards_in_training_and_held_out(runs):
    board = EventAccumulator(str(runs / "base/tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    names = {"reward_chosen", "reward_rejected", "margin", "logp_chosen", "logp_rejected", "routers_changed"}
    assert {f"{place}/{name}" for place in ("dpo", "eval") for name in names} | {"dpo/accuracy", "eval/loss"} <= tags
    assert board.Scalars("dpo/margin")[0].value == 0  # before the first step the policy is the reference
    assert abs(board.Scalars("dpo/margin")[-1].value) > 0 and board.Scalars("train/loss")[0].value == pytest.approx(
        0.693147, abs=1e-6
    )


@pytest.mark.slow
def test_an_evaluation_of_its_own_is_that_of_the_training(runs):
    trained = json.loads((runs / "stored/result.json").read_text())
    alone = json.loads((runs / f"stored/eval-{LAST}.json").read_text())
    assert (
        alone["eval_loss"] == pytest.approx(trained["eval_loss"], abs=1e-6) and alone["accuracy"] == trained["accuracy"]
    )
    lines = [json.loads(line) for line in (runs / f"stored/eval-{LAST}.jsonl").read_text().splitlines()]
    assert len(lines) == 11 and all(line["prediction"] for line in lines)
    assert sum(line["right"] for line in lines) == sum(alone["right"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name, words", [("base", []), ("stored", STORED)])
def test_three_ranks_go_on_with_the_same_pairs(runs, data, tmp_path, name, words, show):
    """In other rows; the reference of "stored" is scored in other rows too."""
    resume = f"train.resume={runs / name}/checkpoints/{MIDDLE}"
    launch(3, [["other", [*data, *words, f"train.output_dir={tmp_path}", resume, "moe.ep_size=1"], "train"]])
    ours, theirs = checkpoints(tmp_path) / LAST, checkpoints(runs / name) / LAST
    drift = differences(tensors(ours), tensors(theirs), "weight/")
    show(f"pairs, {name}, 2 ranks -> 3: weights {drift:.1e}")
    assert drift <= DRIFT and position(ours) == position(theirs)
