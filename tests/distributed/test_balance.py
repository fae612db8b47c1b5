"""Counts, bias and auxiliary gradients do not depend on how ranks and accumulation cut the global batch.

Four fixed micro-batches (one without images, all padded) go through the trainer's own step: EP 1 x accumulation 4,
EP 2 x 2 and EP 4 x 1. Counts are integers over all ranks, so the bias must be bit-identical.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers

from ds_moe.checkpoint.files import Reader, newest_complete
from ds_moe.config.moe import MoEConfig
from ds_moe.config.sections import ModelConfig
from ds_moe.export.model import export_checkpoint
from ds_moe.models.convert import EXPERT_BIAS, convert, load_expert_bias
from ds_moe.models.families import BIAS_SUFFIX
from ds_moe.models.load import load_model
from tests.launcher import run_ranks, start_ranks

RANKS = "tests/distributed/balance_ranks.py"
RUN = "tests/runs/resume.yaml"
GRADIENT = 5e-6  # relative to a tensor's largest entry: fp32 sums in another order
BALANCE = ["moe.balance=[{kind: loss_free, update_rate: 0.01}]", "train.steps=8", "checkpoint.every=4"]
OTHER_TOPOLOGY = ["deepspeed=ds_configs/zero1.json"]
FIRST, LAST = "step_00000004", "step_00000008"


@pytest.fixture(scope="module")
def few():
    """In `make test`: what one rank reports, and what two do."""
    return [run_ranks(RANKS, ranks, ["few"]).json_by_rank for ranks in (1, 2)]


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(RANKS, 1, ["short"]).json


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(RANKS, 2, ["short"]).json_by_rank


@pytest.fixture(scope="module")
def four_ranks():
    return run_ranks(RANKS, 4, ["short"]).json_by_rank


def assert_same_updates(ours, theirs):
    assert [move["counts"] for move in ours] == [move["counts"] for move in theirs], "int64 counts"
    assert [move["bias"] for move in ours] == [move["bias"] for move in theirs], "bits of the bias"


@pytest.mark.slow
def test_counts_and_bias_are_bit_identical_on_every_topology(one_rank, two_ranks, four_ranks):
    expected = one_rank["checkpointing False"]
    assert len(expected) == 2 and all(sum(move["counts"]) > 0 for move in expected)  # one update a layer
    assert all(set(move["bias"]) != {"0"} for move in expected)
    for found in (one_rank, *two_ranks, *four_ranks):
        for checkpointing in (False, True):
            assert_same_updates(found[f"checkpointing {checkpointing}"], expected)


def test_counts_are_those_of_the_real_tokens_and_the_same_on_two_ranks(few):
    """One rank without checkpointing, two with it: what is recomputed counts once."""
    [alone], both = few
    assert alone["padding"] > 0  # to be left out
    expected = alone["checkpointing False"]
    assert len(expected) == 2 and {sum(move["counts"]) for move in expected} == {2 * alone["tokens"]}  # layers; top-2
    for found in both:
        assert_same_updates(found["checkpointing True"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("control", ["per micro-batch", "counted twice"])
def test_a_bias_updated_per_micro_batch_or_counted_twice_is_noticed(one_rank, two_ranks, control):
    """Negative control of the comparison above."""
    with pytest.raises(AssertionError, match="int64 counts"):
        assert_same_updates(two_ranks[0][control], one_rank["checkpointing False"])


def test_a_rank_with_another_bias_is_named(few):
    for found in few[1]:
        assert "step 1: the expert biases of rank 1 differ from rank 0's" in found["disagreement"]


def test_auxiliary_gradients_reach_the_router_once(few, show):
    """Accumulation 4 on one rank, 2 on two, EP 1 and 2, checkpointing on (EP 1) and off (EP 2), ZeRO 1 and 3."""
    lines = ["router gradient, cross entropy + aux, against plain autograd: difference / largest entry"]
    for ranks, (found, *_) in enumerate(few, start=1):
        assert len(found["gradients"]) == 3 * ranks
        for scope, ep_size, difference in found["gradients"]:
            lines.append(f"  {scope:<13} {ranks} ranks x accumulation {4 // ranks}, EP {ep_size}: {difference:.1e}")
            assert difference <= GRADIENT, lines[-1]
        assert found["gradients_doubled"] > 0.1  # negative control: the same loss, twice
    show("\n".join(lines))


def test_fillers_do_not_dilute_the_aux_loss(few, show):
    """One micro-batch of samples, three of fillers: in 4 micro-steps of one rank, packed, and in 2 of two, padded."""
    lines = ["one micro-batch beside three of fillers, against it alone: router gradient, aux loss / its own"]
    for ranks, (found, *_) in enumerate(few, start=1):
        for scope, difference, ratio in found["fillers"]:
            lines.append(f"  {scope:<19} {ranks} ranks x accumulation {4 // ranks}: {difference:.1e}, {ratio:.6f}")
    show("\n".join(lines))
    for found, *_ in few:
        for _, difference, ratio in found["fillers"]:
            assert difference <= GRADIENT and ratio == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_after_20_steps_only_flipped_ties_differ(show):
    """fp32 weights drift apart by rounding; a token between two experts may then go to the other one."""
    runs = [run_ranks(RANKS, ranks, ["long"]).json["20 steps"] for ranks in (1, 2, 4)]
    lines = ["assignments that differ from one rank's, by step and layer, in 20 steps (none: bit-identical)"]
    for ranks, moves in zip((2, 4), runs[1:], strict=True):
        flips, differing = {}, False
        for at, (ours, theirs) in enumerate(zip(moves, runs[0], strict=True)):
            apart = [abs(a - b) for a, b in zip(ours["counts"], theirs["counts"], strict=True)]
            if any(apart):
                flips[f"step {at // 2 + 1}, layer {at % 2}"] = sum(apart) // 2
            differing = differing or any(apart)
            assert differing or ours["bias"] == theirs["bias"], "the bias differs before any count did"
        lines.append(f"  {ranks} ranks: {flips or 'none'}")
        assert sum(flips.values()) <= 20, flips  # of 20 steps x 2 layers x ~1,200 assignments
    show("\n".join(lines))


# --- checkpoints


def bias_tensors(path: Path) -> dict[str, torch.Tensor]:
    reader = Reader(path)
    return {key: reader.read(key) for key in reader.tensors if key.endswith(BIAS_SUFFIX)}


def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    reader = Reader(path)
    return {key: reader.read(key) for key in reader.tensors}


def bit_equal(one, other) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """Runs of one launch: `never` stopped; `lost`, whose checkpoints leave the bias out, and `again` from one."""
    folder = tmp_path_factory.mktemp("balance")
    lost = [f"train.resume={folder}/lost/checkpoints/{FIRST}"]
    router_only = ["train.stage=router_only", "moe.router.kind=noisy_topk"]
    cases = {
        "never": ([], ""),
        "lost": ([], "left out"),
        "again": (lost, "left out"),
        "refused": (lost, ""),
        "resharded": (
            [f"train.resume={folder}/never/checkpoints/{FIRST}", *OTHER_TOPOLOGY, "moe.ep_size=1"],
            "reshard",
        ),
        "router only": (router_only, ""),
        "router only, ZeRO-2": ([*router_only, "deepspeed=ds_configs/zero2.json"], ""),
    }
    cases = {
        name: [[*BALANCE, f"train.output_dir={folder / name}", *overrides], mode]
        for name, (overrides, mode) in cases.items()
    }
    run = run_ranks(RANKS, 2, ["train", json.dumps(cases)])
    (folder / "errors.json").write_text(json.dumps(run.json))
    return folder


def errors(folder: Path) -> dict[str, str]:
    return json.loads((folder / "errors.json").read_text())


@pytest.mark.slow
def test_killed_and_resumed_goes_on_bit_for_bit_with_its_bias(stopped, tmp_path):
    arguments = [RUN, *BALANCE, f"train.output_dir={tmp_path}"]
    run = start_ranks("ds_moe.train", 2, arguments)
    run.wait_for("checkpoint ")
    run.kill()
    run.wait()
    first = newest_complete(tmp_path / "checkpoints")
    assert first is not None and first.name == FIRST, "the run had ended before it was killed"
    assert f"resumed from {first}" in run_ranks("ds_moe.train", 2, arguments).output
    ours, theirs = (all_tensors(folder / "checkpoints" / LAST) for folder in (tmp_path, stopped / "never"))
    assert bit_equal(ours, theirs)
    biases = bias_tensors(stopped / "never" / "checkpoints" / LAST)
    assert len(biases) == 2 and all(bias.dtype == torch.float32 and bias.abs().max() > 0.01 for bias in biases.values())


@pytest.mark.slow
def test_a_bias_left_out_of_the_checkpoint_is_noticed(stopped):
    """Negative control: without it the run that goes on is another one; a plain resume refuses the checkpoint."""
    assert not bias_tensors(stopped / "lost" / "checkpoints" / FIRST)
    ours, theirs = (all_tensors(stopped / name / "checkpoints" / LAST) for name in ("again", "lost"))
    assert not bit_equal(ours, theirs)
    assert "does not fit this model: missing ['buffer/" in errors(stopped)["refused"]


@pytest.mark.slow
def test_the_bias_is_bit_identical_after_resharding(stopped):
    """Saved by EP 2 and ZeRO-3, loaded and saved again at once by EP 1 and ZeRO-1."""
    source, again = (stopped / name / "checkpoints" / FIRST for name in ("never", "resharded"))
    assert json.loads((again / "state.json").read_text())["ep_size"] == 1
    assert bias_tensors(source) and bit_equal(bias_tensors(again), bias_tensors(source))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 4])
def test_the_bias_is_bit_identical_on_another_world_size(stopped, tmp_path, world_size):
    source = stopped / "never" / "checkpoints" / FIRST
    settings = [*BALANCE, *OTHER_TOPOLOGY, f"train.output_dir={tmp_path}", f"train.resume={source}"]
    settings += [f"moe.ep_size={world_size}", "train.micro_batch_size=2"]
    run_ranks(RANKS, world_size, ["train", json.dumps({"resharded": [settings, "reshard"]})])
    again = tmp_path / "checkpoints" / FIRST
    assert json.loads((again / "state.json").read_text())["world_size"] == world_size
    assert bias_tensors(source) and bit_equal(bias_tensors(again), bias_tensors(source))


# --- train.stage


@pytest.mark.slow
def test_router_only_moves_the_routers_and_nothing_else(stopped):
    one, other = (all_tensors(stopped / "router only" / "checkpoints" / step) for step in (FIRST, LAST))
    moved = {key for key in one if key.startswith("weight/") and not torch.equal(one[key], other[key])}
    assert moved == {key for key in one if key.startswith("weight/") and ".mlp.gate." in key} and len(moved) == 4
    assert "frozen experts (model.freeze, train.stage router_only, or lora" in errors(stopped)["router only, ZeRO-2"]


# --- export


@pytest.mark.slow
def test_an_export_loads_with_plain_transformers_and_keeps_the_bias_beside_it(stopped, tmp_path):
    checkpoint = stopped / "never" / "checkpoints" / LAST
    export_checkpoint(checkpoint, tmp_path / "export")
    model, info = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(info.values()), info
    assert EXPERT_BIAS in (tmp_path / "export" / "README.md").read_text()
    ours = load_model(ModelConfig(path=str(tmp_path / "export")), torch.float32)
    convert(ours, MoEConfig(balance=[{"kind": "loss_free"}]))
    load_expert_bias(ours, str(tmp_path / "export"))
    expected = {key.removeprefix("buffer/"): bias for key, bias in bias_tensors(checkpoint).items()}
    assert bit_equal({name: ours.get_buffer(name) for name in expected}, expected)
