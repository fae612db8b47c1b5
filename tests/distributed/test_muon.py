"""Runs by Muon, stopped and resumed: on the same ranks bit for bit, on others within rounding, by another optimizer."""

import json
from pathlib import Path

import pytest
import yaml

from ds_moe.checkpoint.files import Reader
from tests.distributed.test_resume import bit_equal, checkpoints, differences, tensors
from tests.distributed.test_worlds import DRIFT, END, HALFWAY, check_bits, launch, overrides
from tests.launcher import run_ranks

MUON = ["train.optimizer=muon", "train.muon_lr=2e-4", "moe.balance=[{kind: loss_free, update_rate: 1e-3}]"]


def run(model, folder, name, world, stage, ep_size, *more, mode="train"):
    return [name, overrides(model, folder / name, world, stage, ep_size, *MUON, *more), mode]


def from_checkpoint(folder, name):
    return f"train.resume={checkpoints(folder / name) / HALFWAY}"


def test_a_stopped_run_goes_on_bit_for_bit(model, tmp_path):
    """Two ranks, EP 2, ZeRO-3. The checkpoint holds one moment of matrices and two of the rest."""
    name = "zero3-ep2"
    launch(2, [run(model, tmp_path, name, 2, 3, 2), run(model, tmp_path, f"{name} resumed", 2, 3, 2,
                                                         from_checkpoint(tmp_path, name))])  # fmt: skip
    check_bits(tmp_path, name, 2)
    kinds = {key.partition("/")[::2] for key in Reader(checkpoints(tmp_path / name) / END).tensors}
    layer = "model.language_model.layers.0.mlp"
    for parameter, both in ((f"{layer}.experts.down_proj", False), (f"{layer}.gate.weight", True)):
        assert ("exp_avg", parameter) in kinds and (("exp_avg_sq", parameter) in kinds) == both


@pytest.mark.slow  # in `make test`: two ranks that resume their own, above
def test_it_goes_on_on_three_ranks_other_stages_and_ep_sizes(model, tmp_path, show):
    launch(2, [run(model, tmp_path, "two", 2, 2, 2)])
    source, lines = tensors(checkpoints(tmp_path / "two") / HALFWAY), []
    topologies = {2: [(1, 1), (3, 1)], 3: [(1, 3), (2, 1), (3, 1), (3, 3)]}
    for world, cases in topologies.items():
        names = {f"{world} ranks, ZeRO-{stage}, EP {ep_size}": (stage, ep_size) for stage, ep_size in cases}
        resume = from_checkpoint(tmp_path, "two")
        runs = [run(model, tmp_path, name, world, *where, resume) for name, where in names.items()]
        runs += [
            run(model, tmp_path, f"{name} loaded", world, *where, resume, mode="load and save")
            for name, where in names.items()
        ]
        launch(world, runs)
        for name in names:
            assert bit_equal(tensors(checkpoints(tmp_path / f"{name} loaded") / HALFWAY), source), name
            ours, theirs = (tensors(checkpoints(tmp_path / one) / END) for one in (name, "two"))
            drift = max(differences(ours, theirs, kind) for kind in ("weight/", "exp_avg/", "exp_avg_sq/"))
            assert drift <= DRIFT, (name, drift)
            lines.append(f"  Muon, from 2 ranks, ZeRO-2, EP 2 to {name}: loaded bit-equal, trained within {drift:.1e}")
    show("\n".join(lines))


@pytest.mark.slow
def test_a_change_of_the_optimizer(model, tmp_path):
    """From AdamW a run goes on by Muon, upon its first moments; from Muon it does not by AdamW, in one line."""
    adamw = ["train.optimizer=adamw", "train.muon_lr=null"]
    launch(2, [run(model, tmp_path, "muon", 2, 3, 2), run(model, tmp_path, "adamw", 2, 3, 2, *adamw)])
    launch(2, [run(model, tmp_path, "muon after adamw", 2, 3, 2, from_checkpoint(tmp_path, "adamw"))])
    words = run(model, tmp_path, "adamw after muon", 2, 3, 2, *adamw, from_checkpoint(tmp_path, "muon"))[1]
    failed = run_ranks("ds_moe.train", 2, ["tests/runs/resume.yaml", *words], check=False)
    assert "was trained by Muon, and holds no second moments for AdamW: leave train.optimizer muon" in failed.output


@pytest.mark.slow
def test_rows_that_ranks_share(tmp_path):
    """Two ranks that share every packed row step as one rank does that has it whole."""
    base = yaml.safe_load(Path("tests/runs/resume.yaml").read_text())
    del base["train"]["micro_batch_size"]
    base["deepspeed"] = "zero2"
    file, both = tmp_path / "run.yaml", [*MUON, "train.lr=1e-3", "train.steps=2", "train.warmup_steps=0"]
    file.write_text(yaml.safe_dump(base))
    both += ["data.packing=true", "train.tokens_per_micro_batch=512"]
    for world, more in ((2, ["train.sequence_parallel=2"]), (1, ["moe.ep_size=1"])):
        case = [str(world), [*both, f"train.output_dir={tmp_path / str(world)}", *more], "train"]
        run_ranks("tests/distributed/resume_ranks.py", world, [json.dumps([case]), str(file)])
    two, one = (tensors(checkpoints(tmp_path / name) / HALFWAY) for name in "21")
    assert max(differences(two, one, kind) for kind in ("weight/", "exp_avg/")) < DRIFT
