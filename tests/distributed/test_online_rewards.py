"""Reward functions that fail in a run with rl.engine: the run goes on without their completions, and outlives them."""

import json
import time
from pathlib import Path

import pytest

from tests.launcher import run_ranks, start_ranks

RUN = "tests/runs/online.yaml"
FAILS = """
import os, time
def score(completion, answer, record):
    number = sum(map(ord, completion)) % 8
    if number == 0:
        time.sleep(1000)
    if number == 1:
        os._exit(5)
    if number == 2:
        raise ValueError(f"{len(record['messages'])} messages")
    return None if number == 3 else len(completion)
"""
WAITS = """
import os, time
from pathlib import Path
def score(completion, answer, record):
    child = os.fork()
    if child == 0:
        os.setsid()
        time.sleep(1000)
    Path(FOLDER, f"{os.getpid()} {child}").touch()
    time.sleep(1000)
"""


def words(folder: Path, code: str, *overrides: str) -> list[str]:
    (folder / "my_rewards.py").write_text(code.replace("FOLDER", repr(str(folder))))
    reward = f"rl.reward.function={folder / 'my_rewards.py'}:score"
    return [RUN, f"train.output_dir={folder / 'run'}", reward, "rl.engine.prompts=8", *overrides]


@pytest.mark.slow
def test_completions_whose_reward_fails_are_dropped_and_each_kind_is_said_once(tmp_path):
    failing = ["rl.reward.timeout_s=1.0", "rl.reward.max_failed=0.9", "train.steps=8"]
    run = run_ranks("ds_moe.train", 2, words(tmp_path, FAILS, *failing))
    files = sorted((tmp_path / "run/rollouts").glob("round_*.json"))
    found = [json.loads(file.read_text()) for file in files]
    lines = [json.loads(line) for file in files for line in file.with_suffix(".jsonl").read_text().splitlines()]
    assert len(found) >= 2 and all(record["reward"] == len(record["completion"]) for record in lines)
    dropped = sum(one["figures"]["without_reward"] for one in found)
    assert 0 < dropped and len(lines) == sum(one["records"] for one in found) <= 32 * len(found) - dropped
    log = run.output.splitlines()
    kinds = ("took longer than 1 s", "ended its process with status 5", "ValueError: 1 messages", "returned None")
    assert [sum(f"reward score: {kind}" in line for line in log) for kind in kinds] == [1, 1, 1, 1]


@pytest.mark.slow
def test_a_trainer_that_is_killed_leaves_no_process_behind(tmp_path):
    run = start_ranks("ds_moe.train", 2, words(tmp_path, WAITS, "rl.reward.timeout_s=1000.0"))
    deadline = time.monotonic() + 300
    while len(named := [path for path in tmp_path.iterdir() if path.name[0].isdigit()]) < 2:
        assert time.monotonic() < deadline and run.process.poll() is None, run.tails()
        time.sleep(0.1)
    processes = [Path("/proc", number) for path in named for number in path.name.split()]
    assert all(process.exists() for process in processes)
    run.kill(rank=0)
    deadline = time.monotonic() + 60
    while left := [process for process in processes if process.exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
