"""Rounds of rollouts and training through the real launcher: 2 processes, EP 2, ZeRO-3, real images."""

import json
import math
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_moe.checkpoint.files import Reader
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import save_processor, tiny_processor
from ds_moe.tasks.rl import sample
from tests.launcher import run_ranks

STEPS_OF_8 = ["train.global_batch_size=8"]  # of 32 rollouts: two batches of two updates


def rollouts(policy, file, seed):
    model, processor = sample.load_policy(policy, torch.float32)
    samples = sample.open_prompts("digits", 8, seed)
    options = {"per_prompt": 4, "max_new_tokens": 4, "seed": seed, "reward": lambda text, answer: len(text) % 3}
    records = sample.generate_rollouts(model, processor, samples, **options)
    assert len({record["reward"] for record in records}) > 1  # else there would be nothing to learn
    for record in records[::5]:
        del record["routing"]  # those fall back to the live router
    sample.write_rollouts(records, file)
    return records


def train(folder, number, output, *overrides):
    words = [
        "ds_configs/runs/replay_demo.yaml",
        f"model.path={folder / 'start'}",
        f"data.train={folder / f'rollouts_{number}.jsonl'}",
        f"train.output_dir={output}",
        *("train.micro_batch_size=4", "train.global_batch_size=16", "rl.updates_per_batch=2", "rl.router=joint"),
        "train.epochs=1",
        *overrides,
    ]
    run = run_ranks("ds_moe.train", 2, words)
    return run, json.loads((output / "result.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    build_preset("tiny-vl-moe").save_pretrained(folder / "start")
    save_processor(tiny_processor("vl"), folder / "start")
    return folder


@pytest.mark.slow
def test_a_round_of_rollouts_follows_the_other(folder):
    records = rollouts(folder / "start", folder / "rollouts_0.jsonl", seed=0)
    _, first = train(folder, 0, folder / "run", *STEPS_OF_8)
    assert first["step"] == math.ceil(len(records) / 8) == 4 and math.isfinite(first["loss"])
    rollouts(folder / "run", folder / "rollouts_1.jsonl", seed=1)  # of the policy as trained
    every_step = ["checkpoint.every=1", "checkpoint.keep=9", "train.gradient_checkpointing=true"]
    run, second = train(folder, 1, folder / "run", *STEPS_OF_8, *every_step)
    assert second["step"] == 8
    saved = sorted(path.name[-1] for path in (folder / "run/checkpoints").glob("step_*"))
    assert saved == ["4", "6", "8"]  # those that fell due at 5 and 7 waited for their batch's second update
    assert f"resumed from {folder}/run/checkpoints/step_{first['step']:08d}" in run.output
    assert "with the next rollout file" in run.output
    board = EventAccumulator(str(folder / "run/tensorboard"))
    board.Reload()
    tags = {tag for tag in board.Tags()["scalars"] if tag.startswith("rl/")}
    assert tags >= {"rl/reward", "rl/mismatch_k3", "rl/routers_changed", "rl/ratio", "rl/clip_fraction", "rl/ess"}
    mismatch = {event.step: event.value for event in board.Scalars("rl/mismatch_k3")}
    assert list(mismatch) == list(range(1, 9))
    # The engine was in fp32, too, and sampled with the weights that score the first batch of each file: as trained,
    # saved, exported and resumed. The second batch's old policy has moved on.
    on_policy, moved = [mismatch[step] for step in (1, 2, 5, 6)], [mismatch[step] for step in (3, 4, 7, 8)]
    assert max(on_policy) < 1e-6 and min(moved) > 10 * max(on_policy)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_bit_for_bit(folder, tmp_path):
    """From the checkpoint in the middle of the second file, written by the test before."""
    shutil.copytree(folder / "run/checkpoints/step_00000006", tmp_path / "run/checkpoints/step_00000006")
    _, resumed = train(folder, 1, tmp_path / "run", *STEPS_OF_8, "train.gradient_checkpointing=true")
    assert resumed["step"] == 8
    ours, theirs = (Reader(path / "checkpoints/step_00000008") for path in (tmp_path / "run", folder / "run"))
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(ours.read(key), theirs.read(key)) for key in ours.tensors)


@pytest.mark.slow
def test_rollouts_of_another_policy_are_noticed(folder, tmp_path):
    """Negative control: the second round's rollouts scored by the weights that the first began with."""
    other = build_preset("tiny-vl-moe", seed=9)
    with torch.no_grad():
        other.lm_head.weight.mul_(40)
    other.save_pretrained(folder / "start")
    rollouts(folder / "start", folder / "rollouts_2.jsonl", seed=2)
    build_preset("tiny-vl-moe").save_pretrained(folder / "start")
    run, result = train(folder, 2, tmp_path / "run", "moe.replay.enabled=false", "rl.router=none")
    assert result["rl"]["mismatch_k3"] > 1e-3 and "routers_changed" not in result["rl"]
    assert "was data.train sampled from this model at rl.temperature?" in run.output


@pytest.mark.slow
def test_rollouts_of_equal_rewards_say_before_and_after_that_they_teach_nothing(folder, tmp_path):
    records = rollouts(folder / "start", folder / "rollouts_3.jsonl", seed=3)
    groups = len({record["group"] for record in records})
    lines = (folder / "rollouts_3.jsonl").read_text().splitlines()
    equal = [json.dumps(json.loads(line) | {"reward": -3.0}) for line in lines]
    (folder / "rollouts_3.jsonl").write_text("\n".join(equal))
    run, result = train(folder, 3, tmp_path / "run")
    steps = math.ceil(len(records) / 16)
    assert result["step"] == steps and result["rl"]["zero_advantage"] == 1 and result["loss"] == 0
    said = [
        f"-3 to -3 over {len(records)} rollouts; equal in {groups} of {groups} groups (100%)",
        "warning: a group of equal rewards has advantages of 0",
        "step 1: the advantages of all 16 completions are 0",
        f"{steps} of {steps} ({groups} of {groups} groups of data.train have equal rewards)",
    ]
    assert [run.output.count(text) for text in said] == [1] * 4
