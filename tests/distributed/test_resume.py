"""Saved, killed, restarted, resharded: the run goes on as if nothing had happened.

Bit-equal on the same topology; on another EP size, ZeRO stage or world size what is loaded is bit-equal too, and what
is trained from it differs by fp32 sums in another order.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ds_moe.checkpoint.files import Reader, incomplete, newest_complete
from ds_moe.errors import UserError
from ds_moe.export.model import export_checkpoint
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


def launch(world_size: int, cases: list) -> None:
    run_ranks("tests/distributed/resume_ranks.py", world_size, [json.dumps(cases)])


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory) -> Path:
    """Output folder of the run; beside it `dropped`, which resumed from its step 16 without the data position."""
    folder = tmp_path_factory.mktemp("never-stopped")
    output, dropped = folder / "run", folder / "dropped"
    resume = f"train.resume={checkpoints(output)}/step_00000016"
    cases = [["never stopped", [f"train.output_dir={output}"], "train"]]
    cases.append(["dropped", [f"train.output_dir={dropped}", resume], "drop the data position"])
    launch(2, cases)
    return output


@pytest.mark.parametrize("launcher", ["forked", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_killed_and_restarted_equals_never_stopped_bit_for_bit(never_stopped, tmp_path, launcher):
    """SIGKILL of every process in the middle, and other data workers after the restart."""
    arguments = [RUN, f"train.output_dir={tmp_path}"]
    run = start_ranks("ds_moe.train", 2, arguments, launcher=launcher)
    run.wait_for("checkpoint ")
    run.kill()
    run.wait()
    first = newest_complete(checkpoints(tmp_path))
    assert first is not None and first.name != LAST, "the run had ended before it was killed"
    run = run_ranks("ds_moe.train", 2, [*arguments, "data.num_workers=1"], launcher=launcher)
    assert f"resumed from {first}" in run.output
    ours, theirs = checkpoints(tmp_path) / LAST, checkpoints(never_stopped) / LAST
    assert bit_equal(tensors(ours), tensors(theirs))
    assert position(ours) == position(theirs)
    for rank in range(2):
        name = f"rng-{rank:05d}.safetensors"
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


# By world size: name -> overrides. All start from the never-stopped run's step 16 (2 ranks, EP 2, ZeRO-3).
RESHARDED = {
    2: {
        "EP 2 -> 1": ["moe.ep_size=1"],
        "EP 2, ZeRO 3 -> 1": ["deepspeed=ds_configs/zero1.json"],
        "EP 2, ZeRO 3 -> 2": ["deepspeed=ds_configs/zero2.json"],
    },
    4: {
        "EP 2 -> 4, 2 -> 4 ranks": ["moe.ep_size=4", "train.micro_batch_size=2"],
        "EP 2, 2 -> 4 ranks": ["train.micro_batch_size=2"],
        "EP 2 -> 1, 2 -> 4 ranks": ["moe.ep_size=1", "train.micro_batch_size=1"],
    },
    1: {"EP 2 -> 1, 2 -> 1 ranks": ["moe.ep_size=1"]},
}


@pytest.mark.slow  # in `make test`: test_worlds.py, from two ranks to three
@pytest.mark.parametrize("world_size", [2, 1, 4])
def test_resume_on_another_topology(never_stopped, tmp_path, world_size, show):
    """What is loaded is bit-equal, whatever the topology; what is trained from it drifts by rounding only."""
    source = checkpoints(never_stopped) / "step_00000016"
    cases, folders = [], {}
    for name, overrides in RESHARDED[world_size].items():
        folders[name] = start_from(tmp_path, source, name)
        cases.append([name, [f"train.output_dir={folders[name]}", *overrides], "train"])
        again = start_from(tmp_path, source, f"{name} again")
        cases.append([name, [f"train.output_dir={again}", *overrides], "load and save"])
    if world_size == 2:  # and back: EP 1 -> 2
        back = tmp_path / "EP 1 -> 2"
        loaded = checkpoints(tmp_path / "EP 2 -> 1 again") / source.name
        cases.append(["EP 1 -> 2", [f"train.output_dir={back}", f"train.resume={loaded}"], "train"])
        folders["EP 1 -> 2"] = back
    launch(world_size, cases)
    expected, lines = tensors(checkpoints(never_stopped) / LAST), []
    for name, folder in folders.items():
        ours = tensors(checkpoints(folder) / LAST)
        drift = [differences(ours, expected, kind) for kind in ("weight/", "exp_avg/", "exp_avg_sq/")]
        lines.append(f"  {name:<26} weights {drift[0]:.1e}, Adam's moments {drift[1]:.1e} and {drift[2]:.1e}")
        assert max(drift) <= DRIFT, lines[-1]
        assert position(checkpoints(folder) / LAST) == position(checkpoints(never_stopped) / LAST)
    show("\n".join(["largest difference to the run never stopped, 8 steps after resuming:", *lines]))
    for name in RESHARDED[world_size]:
        again = checkpoints(tmp_path / f"{name} again") / source.name
        state = json.loads((again / "state.json").read_text())
        assert state["world_size"] == world_size
        assert bit_equal(tensors(again), tensors(source)), name


def test_resume_without_the_data_position_is_noticed(never_stopped):
    """Negative control: the comparison above fails when the stream starts anew."""
    output = never_stopped.parent / "dropped"
    ours, theirs = tensors(checkpoints(output) / LAST), tensors(checkpoints(never_stopped) / LAST)
    assert differences(ours, theirs, "weight/") > DRIFT
    assert position(checkpoints(output) / LAST) != position(checkpoints(never_stopped) / LAST)


@pytest.fixture
def two_checkpoints(never_stopped, tmp_path) -> Path:
    shutil.copytree(checkpoints(never_stopped), tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000008")
    return tmp_path / "checkpoints"


def test_resume_refuses_a_checkpoint_with_a_missing_file_by_name_and_takes_the_one_before(two_checkpoints):
    newest, before = two_checkpoints / LAST, two_checkpoints / "step_00000016"
    assert newest_complete(two_checkpoints) == newest
    for victim in ("rank-00001.safetensors", "rng-00000.safetensors", "state.json", "model/config.json"):
        content = (newest / victim).read_bytes()
        (newest / victim).unlink()
        notes: list[str] = []
        assert newest_complete(two_checkpoints, notes.append) == before
        assert victim in notes[0] and LAST in notes[0]
        (newest / victim).write_bytes(content)
    assert newest_complete(two_checkpoints) == newest


def test_resume_refuses_truncated_unreadable_and_partial_checkpoints(two_checkpoints):
    newest, before = two_checkpoints / LAST, two_checkpoints / "step_00000016"
    with (newest / "rank-00000.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert "1000 bytes instead of" in str(incomplete(newest))
    (before / "manifest.json").write_text("{")
    assert "manifest.json" in str(incomplete(before))
    (two_checkpoints / ".partial_step_00000032").mkdir()  # what a kill while writing leaves
    assert newest_complete(two_checkpoints, lambda note: None) is None


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_resume_passes_over_a_flipped_bit_and_never_starts_anew_among_checkpoints(two_checkpoints):
    output = two_checkpoints.parent
    damage(two_checkpoints / LAST / "rank-00001.safetensors")
    run = run_ranks("ds_moe.train", 2, [RUN, f"train.output_dir={output}"])
    assert "rank-00001.safetensors is damaged" in run.output
    assert f"resumed from {two_checkpoints / 'step_00000016'}" in run.output

    for folder in two_checkpoints.iterdir():
        if folder.is_dir():
            damage(folder / "rank-00000.safetensors")
    for resume, complaint in {
        "auto": "no usable checkpoint among",
        "never": f"{two_checkpoints} holds {LAST}",
        str(two_checkpoints / LAST): f"no usable checkpoint among ['{LAST}']",
    }.items():
        run = run_ranks(
            "ds_moe.train",
            1,
            [RUN, f"train.output_dir={output}", f"train.resume={resume}", "moe.ep_size=1"],
            check=False,
        )
        assert run.returncode != 0
        assert complaint in run.output and "Traceback" not in run.log(0)
    assert sorted(path.name for path in two_checkpoints.glob("step_*")) == ["step_00000016", LAST]


@pytest.mark.slow
def test_a_rank_that_cannot_write_ends_the_run_everywhere_and_leaves_what_was_saved(two_checkpoints):
    output = two_checkpoints.parent
    before = sorted(path.name for path in two_checkpoints.iterdir())
    arguments = [json.dumps([["full", [f"train.output_dir={output}", "train.steps=25"], "rank 1 cannot write"]])]
    run = run_ranks("tests/distributed/resume_ranks.py", 2, arguments, check=False)
    assert run.returncode != 0
    for rank in range(2):  # both know, and neither waits for the other
        assert "rank 1 could not write checkpoint" in run.log(rank) and "No space left on device" in run.log(rank)
    after = {path.name for path in two_checkpoints.iterdir() if not path.name.startswith(".partial_")}
    assert sorted(after) == before


@pytest.mark.slow
def test_resume_refuses_another_model_by_name_and_shape(two_checkpoints):
    output = two_checkpoints.parent
    run = run_ranks(
        "ds_moe.train",
        1,
        [RUN, f"train.output_dir={output}", "moe.ep_size=1", "model.preset=tiny-vl-dense", "moe=null"],
        check=False,
    )
    assert run.returncode != 0
    assert "does not fit this model" in run.output and "Traceback" not in run.log(0)


def test_export_refuses_a_damaged_checkpoint(two_checkpoints, tmp_path):
    damage(two_checkpoints / LAST / "rank-00001.safetensors")
    with pytest.raises(UserError, match=r"rank-00001\.safetensors is damaged"):
        export_checkpoint(two_checkpoints.parent, tmp_path / "out")
