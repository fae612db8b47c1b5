"""Runs with rl.engine through the real launcher: rounds, weights for the engine, what a stop leaves behind."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_moe.checkpoint.files import Reader
from ds_moe.export.model import export_checkpoint
from ds_moe.weights.files import SafetensorsFiles
from tests.launcher import run_ranks

SCRIPT = "tests/distributed/online_ranks.py"
NO_ENGINE = ["rl.engine=null"]


def launch(folder, *cases, ranks=2, check=True):
    """The reports of all ranks, by case; each case trains into the folder of its name unless it says otherwise."""
    told = [[name, [f"train.output_dir={folder / name}", *overrides], *fault] for name, overrides, *fault in cases]
    return run_ranks(SCRIPT, ranks, [json.dumps(told)], check=check)


def same(one: Path, other: Path, kind: str = "") -> bool:
    """Whether two checkpoints hold the same bits, in the tensors whose keys begin with `kind`."""
    ours, theirs = Reader(one), Reader(other)
    assert ours.tensors.keys() == theirs.tensors.keys()
    return all(torch.equal(ours.read(key), theirs.read(key)) for key in ours.tensors if key.startswith(kind))


def assert_exported(run: Path, step: int, tmp_path: Path) -> None:
    """What the engine was given is what an export of the checkpoint of that step holds, bit for bit."""
    out = tmp_path / f"export_{run.name}"
    export_checkpoint(run / f"checkpoints/step_{step:08d}", out, note=lambda text: None)
    theirs, ours = SafetensorsFiles.of_folder(out), SafetensorsFiles.of_folder(run / f"weights/step_{step:08d}")
    assert ours.shapes == theirs.shapes
    for name in theirs.shapes:
        assert torch.equal(ours.read(name), theirs.read(name)), name
    assert json.loads((run / f"weights/step_{step:08d}/config.json").read_text()) == json.loads(
        (out / "config.json").read_text()
    )


def board(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return found


def curves(run: Path) -> set[str]:
    return set(board(run).Tags()["scalars"])


def curve(run: Path, name: str) -> dict[int, float]:
    return {event.step: event.value for event in board(run).Scalars(name)}


def facts(run: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((run / "rollouts").glob("round_*.json"))]


def assert_rounds(run: Path, count: int) -> None:
    """No round is missing or there twice, and no prompt of one is another's."""
    found = facts(run)
    assert [one["number"] for one in found] == list(range(count))
    assert [one["begin"] for one in found] == [0, *(one["end"] for one in found[:-1])]


def test_rounds_are_sampled_trained_and_handed_over(tmp_path):
    run = launch(tmp_path, ("plain", ["train.steps=4", "checkpoint.every=2"]))
    found = run.json["plain"]
    assert found["result"]["step"] == 4 and found["result"]["rl"]["lag"] == 0
    versions = [version.rpartition(":") for version in found["published"]]
    assert [step for _, _, step in versions] == ["0", "2"] and len({run for run, *_ in versions}) == 1
    mismatch = curve(tmp_path / "plain", "rl/mismatch_k3")
    # The first step of a round has the weights that sampled it.
    assert max(mismatch[1], mismatch[3]) < 1e-9 and min(mismatch[2], mismatch[4]) > 1e-6
    assert {"rl/reward_score", "rl/truncated", "rl/sample_s", "rl/load_s", "rl/weights_s"} <= curves(tmp_path / "plain")
    assert_rounds(tmp_path / "plain", 2)
    assert_exported(tmp_path / "plain", 2, tmp_path)


LORA = "lora={rank: 8, targets: [q_proj, v_proj], experts: true}"
FAR_KL = ["rl.kl_weight=1e-30"]


@pytest.mark.slow
def test_a_round_is_a_file_like_others_and_wrong_weights_stop_a_run(tmp_path):
    round_0 = tmp_path / "plain/rollouts/round_000000.jsonl"
    cases = [
        ("plain", []),
        ("replayed", [*NO_ENGINE, f"data.train={round_0}", "train.steps=2"]),
        ("kl", [*FAR_KL]),
        ("near", ["rl.kl_weight=0.5"]),
        ("lora", [LORA, "rl.kl_weight=0.5", "train.lr=1e-2"]),
        ("packed", ["data.packing=true", "train.tokens_per_micro_batch=256"]),
        ("bf16", ["rl.engine.weights_dtype=bf16"]),
        ("wrong", [], "wrong"),
        ("stale", [], "stale"),
        ("gone", [], "gone"),
    ]
    run = launch(tmp_path, *cases)
    print({name: found.get("error") for name, found in run.json.items()})
    assert [name for name, found in run.json.items() if "error" in found] == ["wrong", "stale", "gone"]
    assert_rounds(tmp_path / "plain", 3)
    assert sorted(path.name for path in (tmp_path / "plain/weights").glob("step_*")) == [
        "step_00000002",
        "step_00000004",
    ]
    # The file of a round is rollouts like any other: without an engine its steps are the same ones, to the bit.
    assert same(tmp_path / "replayed/checkpoints/step_00000002", tmp_path / "plain/checkpoints/step_00000002")
    # A copy of the starting weights takes the place of the run's for some forwards, and nothing of them stays.
    last = "checkpoints/step_00000006"
    assert same(tmp_path / "kl" / last, tmp_path / "plain" / last, "weight/")
    for name in ("kl", "near", "lora"):
        kl = curve(tmp_path / name, "rl/kl")
        assert abs(kl[1]) < 1e-7 < 1e-5 < kl[6], kl
    assert curve(tmp_path / "near", "rl/kl")[6] < curve(tmp_path / "kl", "rl/kl")[6]
    assert_exported(tmp_path / "lora", 4, tmp_path)
    bf16 = curve(tmp_path / "bf16", "rl/mismatch_k3")
    assert 1e-9 < bf16[1] < 1e-2
    for report in run.json_by_rank:
        for name, text in (("wrong", "log-probs of "), ("stale", "exactly those of before")):
            error = report[name]
            assert text in error["error"]
            assert (
                error["kind"] == "UserError"
                and "was given the weights" in error["error"]
                and "\n" not in error["error"]
            )
        assert report["gone"] == {**report["gone"], "kind": "EnginesGone", "error": "no server has answered for 1 s"}
    for name in ("wrong", "stale"):
        assert not (tmp_path / name / "checkpoints/step_00000003").exists()  # no step was taken on them
    assert (tmp_path / "gone/checkpoints/step_00000002").is_dir()


# Where rank 0 ends, and which time that is in its process: in rounds 0, 0, 0, between 0 and 1 twice, in 1, 2, and
# after the last step of 2, whose checkpoint is one of its middle.
KILLS = ["sampling:0", "file:0", "open:0", "publishing:1", "writing:0", "sampling:0", "file:1", "metrics:1"]


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_comes_to_the_same_bits(tmp_path):
    """Each launch goes on where the one before was killed: while it sampled, between a round's file and what is known
    of it, between that and a step, while weights were written or read."""
    launch(tmp_path, ("whole", []))
    for fault in KILLS:
        where, number = fault.split(":")
        run = launch(tmp_path, ("killed", [], f"kill:{where}:{number}"), check=False)
        assert run.returncode != 0 and f"killed in {where}" in run.log(0), run.tails()
    run = launch(tmp_path, ("killed", []))
    assert run.json["killed"]["result"]["step"] == 6
    assert_rounds(tmp_path / "killed", 3)
    assert same(tmp_path / "killed/checkpoints/step_00000006", tmp_path / "whole/checkpoints/step_00000006")
    for number in range(3):
        ours, theirs = ((tmp_path / run / f"rollouts/round_{number:06d}.jsonl") for run in ("killed", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_a_round_whose_file_is_gone_is_sampled_anew(tmp_path):
    launch(tmp_path, ("run", ["train.steps=3"]))
    (tmp_path / "run/rollouts/round_000001.jsonl").unlink()
    run = launch(tmp_path, ("run", ["train.steps=6"]))
    assert "round 1 of rollouts is not there any more as the checkpoint knows it" in run.log(0)
    assert run.json["run"]["result"]["step"] == 6


@pytest.mark.slow
def test_sampling_ahead_overlaps_with_training_and_drops_what_is_too_old(tmp_path):
    lag = ["rl.engine.lag=1", "rl.correction=tis", "train.steps=8"]
    run = launch(
        tmp_path, ("none", ["train.steps=8"], "slow:3"), ("one", lag, "slow:3"), ("two", ["rl.engine.lag=2", *lag[1:]])
    )
    for name, expected in (("none", [0, 0, 0, 0]), ("one", [0, 1, 1, 1]), ("two", [0, 1, 2, 2])):
        found = curve(tmp_path / name, "rl/lag")
        assert [found[step] for step in (1, 3, 5, 7)] == expected, (name, found)
        assert_rounds(tmp_path / name, 4)
    waited = {name: curve(tmp_path / name, "rl/wait_s") for name in ("none", "one")}
    trained = curve(tmp_path / "one", "rl/train_s")
    print(waited, trained)
    for step in (5, 7):  # a round waits less by what was trained meanwhile
        saved = waited["none"][step] - waited["one"][step]
        assert saved > 0.5 * min(trained[step], 3.0)
    assert run.json["one"]["published"][0].endswith(":0")


@pytest.mark.slow
def test_the_engine_of_this_machine_trains_on_three_ranks(tmp_path):
    """No EP, ZeRO-2, the engine in a process of its own, which ends with the run."""
    words = ["tests/runs/online.yaml", f"train.output_dir={tmp_path / 'run'}", "moe.ep_size=1", "deepspeed=zero2"]
    words += ["train.global_batch_size=12", "rl.engine.completions=6", "rl.updates_per_batch=2", "train.steps=4"]
    run = run_ranks("ds_moe.train", 3, words)
    assert "round 1 from step 3: reward 0.000" in run.log(0)
    assert_rounds(tmp_path / "run", 2)
    assert_exported(tmp_path / "run", 2, tmp_path)
    assert not list(run.alive())
