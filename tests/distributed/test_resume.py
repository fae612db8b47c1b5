"""Saved, killed, restarted, resharded: the run goes on as if nothing had happened.

Bit-equal on the same topology; on another EP size, ZeRO stage or world size what is loaded is bit-equal too, and what
is trained from it differs by fp32 sums in another order.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ds_moe.checkpoint import Reader, incomplete, newest_complete
from tests.launcher import run_ranks, start_ranks

RUN = "tests/runs/resume.yaml"
LAST = "step_00000024"
DRIFT = 1e-6  # of weights, after 8 steps on another topology (lr 1e-4): the invariant


def checkpoints(output_dir: Path) -> Path:
    return output_dir / "checkpoints"


def tensors(path: Path) -> dict[str, torch.Tensor]:
    reader = Reader(path)
    return {key: reader.read(key) for key in reader.tensors}


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], kind: str) -> float:
    keys = [key for key in one if key.startswith(kind)]
    assert keys and set(one) == set(other)
    return max((one[key] - other[key]).abs().max().item() for key in keys)


def bit_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def position(path: Path) -> dict:
    return json.loads((path / "state.json").read_text())["data"]


def start_from(folder: Path, source: Path, name: str) -> Path:
    """An output folder that holds only the checkpoint `source`."""
    output = folder / name
    shutil.copytree(source, checkpoints(output) / source.name)
    return output


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("never-stopped")
    run_ranks("tests/distributed/resume_ranks.py", 2, [json.dumps([["a", [f"train.output_dir={output}"], None]])])
    return output


def test_killed_and_restarted_equals_never_stopped_bit_for_bit(never_stopped, tmp_path):
    """SIGKILL of every process in the middle, through the deepspeed launcher; other data workers after the restart."""
    arguments = [RUN, f"train.output_dir={tmp_path}"]
    run = start_ranks("ds_moe.train", 2, arguments, launcher="deepspeed")
    run.wait_for("checkpoint ", timeout=120)
    run.kill()
    run.wait(timeout=30)
    first = newest_complete(checkpoints(tmp_path))
    assert first is not None and first.name != LAST, "the run had ended before it was killed"
    run = run_ranks("ds_moe.train", 2, [*arguments, "data.num_workers=1"], launcher="deepspeed")
    assert f"resumed from {first}" in run.output
    ours, theirs = checkpoints(tmp_path) / LAST, checkpoints(never_stopped) / LAST
    assert bit_equal(tensors(ours), tensors(theirs))
    assert position(ours) == position(theirs)
    for rank in range(2):
        name = f"rng-{rank:05d}.safetensors"
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


# name, world size, overrides; all start from the never-stopped run's checkpoint at step 16 (2 ranks, EP 2, ZeRO-3)
RESHARDED = {
    2: {
        "EP 2 -> 1": ["moe.ep_size=1"],
        "EP 2, ZeRO 3 -> 1": ["deepspeed=ds_configs/zero1.json"],
        "EP 2, ZeRO 3 -> 2": ["deepspeed=ds_configs/zero2.json"],
    },
    4: {
        "EP 2 -> 4, 2 -> 4 ranks": ["moe.ep_size=4", "train.micro_batch_size=2"],
        "EP 2 -> 2, 2 -> 4 ranks": ["train.micro_batch_size=2"],
        "EP 2 -> 1, 2 -> 4 ranks": ["moe.ep_size=1", "train.micro_batch_size=1"],
    },
    1: {"EP 2 -> 1, 2 -> 1 ranks": ["moe.ep_size=1"]},
}


@pytest.mark.parametrize("world_size", list(RESHARDED))
def test_resume_on_another_topology(never_stopped, tmp_path, world_size, show):
    source = checkpoints(never_stopped) / "step_00000016"
    cases, folders = [], {}
    for name, overrides in RESHARDED[world_size].items():
        folders[name] = start_from(tmp_path, source, name.replace(" ", "_").replace(">", ""))
        # Straight after loading, a checkpoint of what is in the engine: one step at a learning rate of nothing is not
        # possible without moving Adam, so the run is also stopped at the loaded step.
        cases.append([name, [f"train.output_dir={folders[name]}", *overrides], None])
    run_ranks("tests/distributed/resume_ranks.py", world_size, [json.dumps(cases)], timeout=300)
    expected, lines = tensors(checkpoints(never_stopped) / LAST), []
    for name, folder in folders.items():
        ours = tensors(checkpoints(folder) / LAST)
        drift = {kind: differences(ours, expected, kind) for kind in ("weight", "exp_avg/", "exp_avg_sq/")}
        lines.append(f"  {name:<26}" + "".join(f"{kind.strip('/')} {value:.1e}   " for kind, value in drift.items()))
        assert position(checkpoints(folder) / LAST) == position(checkpoints(never_stopped) / LAST)
        assert max(drift.values()) <= DRIFT, lines[-1]
    show("\n".join([f"resumed on {world_size} ranks, largest difference to the run never stopped:", *lines]))
