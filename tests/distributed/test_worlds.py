"""Resume on any number of ranks: 1, 2, 3 and 5, at every ZeRO stage and every EP size that divides ranks and experts.

DeepSpeed pads a rank's piece of a tensor that the ranks do not divide, and 30 experts make EP 3 and 5 possible.
"""

import itertools
import json
from pathlib import Path

import pytest

from tests.distributed.conftest import EXPERTS
from tests.distributed.test_resume import bit_equal, checkpoints, differences, position, tensors
from tests.launcher import run_ranks

HALFWAY, END = "step_00000002", "step_00000003"
DRIFT = 1e-6  # of weights and moments after one step on another number of ranks
STAGES = (1, 2, 3)


def overrides(model: Path, output: Path, world: int, stage: int, ep_size: int, *more: str) -> list[str]:
    return [
        "model.preset=null",
        f"model.path={model}",
        f"train.output_dir={output}",
        f"train.micro_batch_size={30 // world}",
        "train.global_batch_size=30",
        "train.steps=3",
        "train.warmup_steps=1",
        "checkpoint.every=2",
        f"moe.ep_size={ep_size}",
        f"deepspeed=ds_configs/zero{stage}.json",
        *more,
    ]


def launch(world: int, cases: list) -> None:
    run_ranks("tests/distributed/resume_ranks.py", world, [json.dumps(cases)])


@pytest.fixture(scope="module")
def two_ranks(model, tmp_path_factory) -> Path:
    """What every world goes on from: a run on two ranks, EP 2, ZeRO-2."""
    output = tmp_path_factory.mktemp("two")
    launch(2, [["two", overrides(model, output, 2, 2, 2), "train"]])
    return output


def check_own(model: Path, folder: Path, world: int, stage: int, ep_size: int) -> None:
    """A topology resumes its own checkpoint bit for bit."""
    name = f"zero{stage}-ep{ep_size}"
    own = f"train.resume={checkpoints(folder / name) / HALFWAY}"
    runs = [(name, []), (f"{name} resumed", [own])]
    launch(world, [[run, overrides(model, folder / run, world, stage, ep_size, *more), "train"] for run, more in runs])
    check_bits(folder, name, world)


def check_bits(folder: Path, name: str, world: int) -> None:
    whole, resumed = (checkpoints(folder / f"{name}{kind}") / END for kind in ("", " resumed"))
    assert bit_equal(tensors(whole), tensors(resumed)), name
    assert position(whole) == position(resumed)
    for rank in range(world):
        random_state = f"rng-{rank:05d}.safetensors"
        assert (whole / random_state).read_bytes() == (resumed / random_state).read_bytes()


def check_world(model: Path, two_ranks: Path, folder: Path, world: int, topologies: list[tuple[int, int]]) -> list[str]:
    """Each topology resumes its own checkpoint bit for bit, and that of two ranks: loaded bit for bit, trained within
    rounding. Returns a line for each."""
    cases, source = [], checkpoints(two_ranks) / HALFWAY
    for stage, ep_size in topologies:
        name = f"zero{stage}-ep{ep_size}"
        own = f"train.resume={checkpoints(folder / name) / HALFWAY}"
        for kind, mode, more in (
            ("", "train", []),
            (" resumed", "train", [own]),
            (" loaded", "load and save", [f"train.resume={source}"]),
            (" from two", "train", [f"train.resume={source}"]),
        ):
            words = overrides(model, folder / f"{name}{kind}", world, stage, ep_size, *more)
            cases.append([f"{name}{kind}", words, mode])
    launch(world, cases)
    lines = []
    for stage, ep_size in topologies:
        name = f"zero{stage}-ep{ep_size}"
        check_bits(folder, name, world)
        assert bit_equal(tensors(checkpoints(folder / f"{name} loaded") / HALFWAY), tensors(source)), name
        ours, theirs = tensors(checkpoints(folder / f"{name} from two") / END), tensors(checkpoints(two_ranks) / END)
        drift = max(differences(ours, theirs, kind) for kind in ("weight/", "exp_avg/", "exp_avg_sq/"))
        assert drift <= DRIFT, (name, drift)
        lines.append(f"  {world} ranks, ZeRO-{stage}, EP {ep_size}: resumed bit-equal; from 2 ranks within {drift:.1e}")
    return lines


def test_three_ranks_resume(model, tmp_path):
    check_own(model, tmp_path, 3, 3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_any_number_of_ranks_resumes(world, model, two_ranks, tmp_path, show):
    sizes = [size for size in range(1, world + 1) if world % size == 0 and EXPERTS % size == 0]
    show("\n".join(check_world(model, two_ranks, tmp_path, world, list(itertools.product(STAGES, sizes)))))
