"""How all ranks learn of what rank 0 has made or failed with, and which runs are the same one."""

import threading
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from ds_moe.config.run_file import load_run
from ds_moe.errors import UserError
from ds_moe.rollout.engine import EnginesGone
from ds_moe.rollout.http import Refused
from ds_moe.tasks.rl.online import rounds as rounds_module
from ds_moe.tasks.rl.online.rounds import Rounds, raise_on_all, run_identity
from ds_moe.tasks.rl.online.sampler import Sampler
from ds_moe.tasks.rl.online.task import OnlinePolicyOptimization

FULL = OSError(28, "No space left on device", "rollouts/x")


@pytest.mark.parametrize(
    "failure, kind",
    [
        (UserError("a"), UserError),
        (Refused("a", 400), UserError),
        (EnginesGone("a"), EnginesGone),
        (FULL, UserError),
        (KeyError("a"), RuntimeError),
    ],
)
def test_all_ranks_end_in_the_same_way(monkeypatch, failure, kind):
    told = []

    def of_rank_0(value):
        told.append(value if not told else told[0])
        return [told[0], None]

    monkeypatch.setattr(rounds_module, "over_ranks", of_rank_0)
    with pytest.raises(kind if kind is not RuntimeError else KeyError) as ours:
        raise_on_all(failure)
    with pytest.raises(kind) as theirs:
        raise_on_all(None)
    assert str(ours.value) == str(theirs.value) and type(theirs.value) is kind
    told[:] = [None]
    raise_on_all(None)


def test_a_sampling_that_stands_still_ends_the_wait(monkeypatch):
    """The watchdog does not see it: the ranks that wait do move."""
    goes_on, turns = threading.Event(), []
    engine = SimpleNamespace(publish=lambda folder, version: goes_on.wait(60), close=goes_on.set)
    stopping = []
    sampler = Sampler(engine, SimpleNamespace(close=lambda: None), stopping.append, None)
    sampler.hand_over(None, "r:0", 0, 0, [], [])
    rounds = object.__new__(Rounds)
    parts = SimpleNamespace(topology=SimpleNamespace(device=torch.device("cpu")), turn=turns.append)
    rounds._parts, rounds._sampler, rounds._most_s = parts, sampler, 0.5
    monkeypatch.setattr(rounds_module.dist, "all_reduce", lambda value: None)
    with pytest.raises(EnginesGone, match="sampling has stood still for 0.5 s"):
        rounds._waited_for(Future())
    assert turns and sampler.quiet_s > 0.5
    [stopping] = stopping
    assert not stopping() and sampler.quiet_s < 0.5  # as it is asked while rollouts come
    sampler.close()


def test_only_what_changes_rollouts_makes_another_run():
    words = ["rl.reward.function=tests/distributed/online_reward.py:score"]

    def identity(*more):
        return run_identity(load_run("tests/runs/online.yaml", [*words, *more]), "sha")

    same = ["rl.reward.processes=3", "rl.reward.timeout_s=3", "rl.reward.memory_gb=3", "rl.reward.max_failed=0.1"]
    same += ["rl.engine.keep_rounds=3", "rl.engine.weights_dir=elsewhere", "train.output_dir=elsewhere"]
    assert identity(*same) == identity()
    others = ["rl.engine.max_new_tokens=3", "rl.temperature=0.5", "data.max_pixels=4096", "train.lr=1e-5"]
    assert len({identity(), *map(identity, others)}) == 1 + len(others)
    assert identity("data.train=a.jsonl", "data.root=tests") != identity("data.train=a.jsonl", "data.root=docs")


def test_the_starting_policy_takes_its_place_once_for_all_steps_of_a_batch():
    @dataclass
    class Batch:
        number: int
        reference_BS: object = None

    entered = []

    @contextmanager
    def in_place():
        entered.append(True)
        yield

    task = SimpleNamespace(_start=SimpleNamespace(in_place=in_place), scored=lambda batch: (batch.number, None))
    steps = OnlinePolicyOptimization._with_reference(task, [[Batch(1), Batch(2)], [Batch(3)]])
    assert steps == [[Batch(1, 1), Batch(2, 2)], [Batch(3, 3)]] and len(entered) == 1
