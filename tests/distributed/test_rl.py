"""Rounds of rollouts and training through the real launcher: 2 processes, EP 2, ZeRO-3, real images."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_moe.models.presets import build_preset
from ds_moe.models.processor import save_processor, tiny_processor
from tests.launcher import run_ranks

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("make_rollouts", ROOT / "tools/make_rollouts.py")
tool = importlib.util.module_from_spec(SPEC)
sys.modules["make_rollouts"] = tool
SPEC.loader.exec_module(tool)


def rollouts(policy, file, seed):
    model, processor = tool.load_policy(policy, torch.float32)
    samples = tool.open_prompts("digits", 8, seed)
    records = tool.generate_rollouts(model, processor, samples, per_prompt=4, max_new_tokens=4, seed=seed)
    for record in records[::5]:
        del record["routing"]  # those fall back to the live router
    tool.write_rollouts(records, file)
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
    run = run_ranks("ds_moe.train", 2, words, timeout=200)
    return run, json.loads((output / "result.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    build_preset("tiny-vl-moe").save_pretrained(folder / "start")
    save_processor(tiny_processor("vl"), folder / "start")
    return folder


def test_a_round_of_rollouts_follows_the_other(folder):
    records = rollouts(folder / "start", folder / "rollouts_0.jsonl", seed=0)
    _, first = train(folder, 0, folder / "run")
    assert first["step"] == math.ceil(len(records) / 16) and math.isfinite(first["loss"])
    assert 0 <= first["rl"]["mismatch_k3"] < 1e-6  # the engine was in fp32, too
    assert first["rl"]["ess"] > 0.999
    rollouts(folder / "run", folder / "rollouts_1.jsonl", seed=1)  # of the policy as trained
    run, second = train(folder, 1, folder / "run", "train.gradient_checkpointing=true")
    assert second["step"] == 2 * first["step"]
    assert f"resumed from {folder}/run/checkpoints/step_{first['step']:08d}" in run.output
    assert "with the next rollout file" in run.output
    assert second["rl"]["mismatch_k3"] < 1e-6  # the trained weights were what sampled: both loaded and exported right
    board = EventAccumulator(str(folder / "run/tensorboard"))
    board.Reload()
    tags = {tag for tag in board.Tags()["scalars"] if tag.startswith("rl/")}
    assert tags >= {"rl/reward", "rl/mismatch_k3", "rl/routers_changed", "rl/ratio", "rl/clip_fraction", "rl/ess"}
    assert [event.step for event in board.Scalars("rl/reward")] == list(range(1, second["step"] + 1))


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
