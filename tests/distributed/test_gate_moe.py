"""A gate over a base with experts: frozen, sharded by EP and ZeRO-3. Against PEFT, stages, resume, commands, export."""

import json
from pathlib import Path

import peft
import pytest
import torch

from ds_moe.cli import main
from ds_moe.config.run_file import load_run
from ds_moe.data.encode import collate
from ds_moe.tasks.gate.commands import load_gated
from tests.distributed.gate_data import HELD_OUT, make, moe_base, qwen_base
from tests.distributed.gate_ranks import NAMES, OVER_EXPERTS, RUN, STAGES_OVER_EXPERTS
from tests.distributed.test_gate import JOINT, KL, check_one_hot, check_parity, kept, launch, over_experts, start
from tests.distributed.test_resume import LAST, bit_equal, checkpoints, position, start_from, tensors
from tests.launcher import Ranks
from tests.tasks.gate.gated import PROCESSOR, encoded, fixed

pytestmark = pytest.mark.slow
EP2 = "moe.ep_size=2"
ANSWERS = [f"gate.kl_weight={KL}", "gate.entropy_weight=0.05", "train.max_new_tokens=3", "train.steps=8"]


ALONE = ["gate.kl_weight=0.0", "train.max_new_tokens=3", "train.steps=8"]  # a stage that follows none


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gate over experts")
    make(folder)
    return folder


@pytest.fixture(scope="module")
def trained(made) -> tuple[Path, Ranks]:
    """The three stages, the last one also from its middle and on another EP size, in packed rows, and parity."""
    joint = [start(made, "end_to_end"), *JOINT, "train.max_new_tokens=3"]
    end_to_end = [start(made, "supervised"), "gate.stage=end_to_end", *ANSWERS]
    cases = [
        ["supervised", over_experts(made, "supervised", EP2), "train"],
        ["end_to_end", over_experts(made, "end_to_end", EP2, *end_to_end), "train"],
        ["joint", over_experts(made, "joint", EP2, *joint), "train"],
        ["joint, packed", over_experts(made, "packed", EP2, *joint, "train.steps=6"), "train packed"],
        ["ZeRO 2", over_experts(made, "zero2", EP2, "deepspeed=ds_configs/zero2.json"), "refused"],
        ["parity", over_experts(made, "none", start(made, "supervised")), "parity over experts"],
        ["one hot", over_experts(made, "none"), "one hot"],
        ["Qwen3.5, one hot", over_experts(made, "none", kind="qwen3.5"), "one hot"],
        ["Qwen3.5", over_experts(made, "qwen", EP2, *JOINT, *ALONE, kind="qwen3.5"), "train"],
    ]
    return made, launch(2, cases)


@pytest.fixture(scope="module")
def resumed(trained) -> Path:
    made, _ = trained
    source = checkpoints(made / "joint") / "step_00000016"
    joint = [start(made, "end_to_end"), *JOINT, "train.max_new_tokens=3"]
    cases = [
        ["resumed", over_experts(made, start_from(made, source, "resumed"), EP2, *joint), "train"],
        ["EP 1", over_experts(made, start_from(made, source, "EP 1"), "moe.ep_size=1", *joint), "load and save"],
    ]
    launch(2, cases)
    return made


def test_one_hot_is_that_adapter_under_peft(trained, show):
    check_one_hot(trained[1].json["one hot"], len(OVER_EXPERTS), show)


def test_one_hot_with_adapters_inside_of_blocks_with_experts(trained, show):
    """Shared experts, in Qwen3.5-MoE, whose rows cannot be packed."""
    check_one_hot(trained[1].json["Qwen3.5, one hot"], len(OVER_EXPERTS), show, layouts=1)


def test_one_hot_over_three_ranks(made, show):
    found = launch(3, [["one hot", over_experts(made, "none"), "one hot"]]).json["one hot"]
    check_one_hot(found, len(OVER_EXPERTS), show)


def test_parity_of_every_stage_with_one_plain_process(trained, show):
    check_parity(trained[1].json["parity"], len(STAGES_OVER_EXPERTS), show)


def test_the_stages_follow_one_another(trained):
    _, run = trained
    for name in ("supervised", "end_to_end", "joint", "joint, packed", "Qwen3.5"):
        assert run.json[name]["eval_loss"] > 0 and run.json[name]["accuracy"]["mean"] >= 0, name
    assert run.json["end_to_end"]["gate"]["kl_to_supervised"] > 0
    # Supervised, no token passes an expert; later each is counted once, whatever else reads the request.
    assert "max_vio" not in run.json["supervised"] and run.json["joint"]["max_vio"] >= 0


def test_below_zero_3_it_is_refused(trained):
    assert "task gate) need ZeRO stage 3" in trained[1].json["ZeRO 2"]


def test_checkpoints_hold_the_gate_and_the_adapters_alone(trained):
    made, _ = trained
    names = kept(checkpoints(made / "joint") / LAST)
    assert not any(".experts." in name or ".mlp.gate." in name for name in names)
    assert sum(name.endswith("lora_A") for name in names) == 3 * 4 + 2  # q, k, v, o of each layer; up and down of one


def test_resumed_equals_never_stopped_bit_for_bit(resumed):
    ours, theirs = (checkpoints(resumed / name) / LAST for name in ("resumed", "joint"))
    assert bit_equal(tensors(ours), tensors(theirs)) and position(ours) == position(theirs)
    other = tensors(checkpoints(resumed / "EP 1") / "step_00000016")
    assert bit_equal(other, tensors(checkpoints(resumed / "joint") / "step_00000016"))


def test_eval_predict_and_export(trained, tmp_path, capsys):
    made, _ = trained
    run, requests = over_experts(made, "joint", EP2, *JOINT[:2]), made / "data/requests-held_out.jsonl"
    assert main(["gate", "eval", RUN, *run, "--json", str(tmp_path / "eval.json")]) in (0, 2)
    assert json.loads((tmp_path / "eval.json").read_text())["total"] == HELD_OUT
    of_run = json.loads((made / "joint/result.json").read_text())
    gated = load_gated(RUN, run, None)
    capsys.readouterr()
    assert main(["gate", "predict", RUN, *run, "--requests", str(requests)]) == 0
    predicted = [json.loads(line)["adapter"] for line in capsys.readouterr().out.splitlines()]
    assert len(predicted) == 6 and set(predicted) <= set(NAMES) and of_run["step"] == 24
    out = tmp_path / "out"
    assert main(["gate", "export", str(made / "joint"), str(out), "--manifest", str(requests)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert [entry["lora_name"] for entry in manifest["requests"]] == predicted
    check_exported(gated.model, out / "adapters", moe_base, made / "moe adapters")


def test_adapters_inside_of_blocks_with_experts_are_exported(trained, tmp_path):
    made, _ = trained
    assert main(["gate", "export", str(made / "qwen"), str(tmp_path / "out")]) == 0
    gated = load_gated(RUN, over_experts(made, "qwen", EP2, *JOINT, *ALONE, kind="qwen3.5"), None)
    check_exported(gated.model, tmp_path / "out/adapters", qwen_base, made / "qwen3.5 adapters")


@torch.no_grad()
def check_exported(model, adapters, base, as_read):
    """Each adapter, in plain PEFT on plain transformers, is the gated model with that choice, and was trained."""
    inputs = collate(encoded(), PROCESSOR).inputs
    for index, name in enumerate(NAMES):
        ours = fixed(model, torch.eye(len(NAMES))[index])(**inputs, use_cache=False).logits
        exported, before = (
            peft.PeftModel.from_pretrained(base(), folder / name).eval()(**inputs, use_cache=False).logits
            for folder in (adapters, as_read)
        )
        assert (ours - exported).abs().max() <= 1e-6 < 1e-5 < (ours - before).abs().max(), name


def test_the_command_trains_and_says_what_it_gates(made, capsys):
    run = over_experts(made, "command", "moe.ep_size=1", "train.steps=4")
    assert main(["gate", "train", RUN, *run, "--nproc", "2"]) == 0
    result = json.loads((made / "command/result.json").read_text())
    assert result["step"] == 4 and result["gate"]["routing_accuracy"] > 0
    assert load_run(RUN, run).moe.ep_size == 1
