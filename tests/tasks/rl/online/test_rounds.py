"""How all ranks learn of what rank 0 has made or failed with, and which runs are the same one."""

import threading
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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


def made_sampler(compare=lambda *given: None):
    """A sampler whose engine loads anything."""
    engine = SimpleNamespace(publish=lambda folder, version: None, close=lambda: None)
    maker = SimpleNamespace(trained={}, round=lambda number, begin: SimpleNamespace(end=number))
    check = SimpleNamespace(compare=compare)
    return Sampler(engine, SimpleNamespace(close=lambda: None), lambda stopping: maker, check), maker


def test_two_versions_are_kept_and_those_that_wait_for_the_engine(tmp_path):
    folders = [tmp_path / f"step_{step:08d}" for step in (0, 2, 4, 6)]
    for folder in folders:
        folder.mkdir()
    sampler, maker = made_sampler()
    sampler.hand_over(folders[2], "r:4", 4, 2, [], []).result(60)
    assert [folder.exists() for folder in folders] == [False, True, True, True]  # the last one is not handed over yet
    assert maker.trained == {"r:4": 2} and (maker.version, maker.step) == ("r:4", 4)
    sampler.close()


def test_no_round_is_sampled_after_a_hand_over_that_failed():
    def wrong(*given):
        raise UserError("other weights")

    sampler, maker = made_sampler(wrong)
    first = sampler.hand_over(Path("step_2"), "r:2", 2, 1, [], [])
    for later in (first, sampler.want(1, 0), sampler.want(2)):
        with pytest.raises(UserError, match="other weights"):
            later.result(60)
    assert maker.trained == {}
    sampler.close()


@pytest.mark.parametrize("lag", [0, 1])
def test_rollouts_of_another_model_end_a_run_without_a_lag(lag):
    notes = []
    config = load_run("tests/runs/online.yaml", [f"rl.engine.lag={lag}", *(["rl.correction=tis"] if lag else [])])
    task = SimpleNamespace(parts=SimpleNamespace(config=config, note=notes.append))
    if lag == 0:
        with pytest.raises(UserError, match="step 1: half: does the engine sample at rl.temperature"):
            OnlinePolicyOptimization.note_mismatch(task, "step 1: half")
    else:
        OnlinePolicyOptimization.note_mismatch(task, "step 1: half")
    assert notes == (["step 1: half"] if lag else [])


def test_only_what_changes_rollouts_makes_another_run(monkeypatch):
    words = ["rl.reward.function=tests/distributed/online_reward.py:score"]

    def identity(*more):
        return run_identity(load_run("tests/runs/online.yaml", [*words, *more]), "sha")

    same = ["rl.reward.processes=3", "rl.reward.timeout_s=3", "rl.reward.memory_gb=3", "rl.reward.max_failed=0.1"]
    same += ["rl.engine.keep_rounds=3", "rl.engine.weights_dir=elsewhere", "train.output_dir=elsewhere"]
    same += ["train.micro_batch_size=2", "rl.engine.timeout_s=3"]
    assert identity(*same) == identity()
    others = ["rl.engine.max_new_tokens=3", "rl.temperature=0.5", "data.max_pixels=4096", "train.lr=1e-5"]
    before = {identity(), *map(identity, others)}
    assert len(before) == 1 + len(others)
    server = ["rl.engine.kind=vllm", "rl.engine.urls=[http://127.0.0.1:8000]"]
    other_server = ["rl.engine.urls=[http://127.0.0.1:8001]", "rl.engine.in_flight=3", "rl.engine.wait_s=3"]
    assert identity(*server) == identity(server[0], *other_server, "rl.engine.model=policy")
    assert run_identity(load_run("tests/runs/online.yaml", words), "other data") != identity()
    monkeypatch.setattr(rounds_module, "base_identity", lambda config: "another model")
    assert identity() not in before
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
