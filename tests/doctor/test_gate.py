"""What the doctor says of a gate: each mistake once, at its own key."""

import json
from pathlib import Path

import peft
import pytest

from ds_moe.cli import main
from ds_moe.models.presets import PRESETS, build_preset
from tests.doctor.broken_run import doctor, edit, zero

GATES = {  # what stands in section gate, from line 13 -> how the complaint begins
    "adapters_in: nowhere": "run.yaml:13: nowhere: no such folder of adapters",
    "adapters: {one: x, two: y}": "run.yaml:13: adapter 'one': x holds no adapter_config.json",
    "width: 8\n  adapters_in: nowhere\n  adapters: {'a/b': x}": "run.yaml:15: adapter name 'a/b' cannot name a folder",
}


@pytest.mark.parametrize("model", ["tiny-vl-dense", "not/here"])
@pytest.mark.parametrize("section, expected", GATES.items())
def test_a_gates_mistake_is_reported_once_and_at_its_own_key(healthy, capsys, section, expected, model):
    edit("preset: tiny-vl-moe", f"preset: {model}" if model in PRESETS else f"path: {model}")
    edit("moe:\n  ep_size: 2\n", "task: gate\n")
    edit("train: digits", "train: routed.jsonl")
    edit("deepspeed: zero.json", f"gate:\n  {section}\ndeepspeed: zero.json")
    code, lines, _ = doctor(capsys)
    [error] = [line for line in lines if line.startswith("error")]
    assert code == 1 and error.startswith(f"error    {expected}")


def test_a_text_layer_that_a_gates_model_lacks_is_reported_at_its_key(healthy, capsys):
    edit("tiny-vl-moe", "tiny-vl-dense")
    edit("moe:\n  ep_size: 2\n", "task: gate\n")
    edit("deepspeed: zero.json", "gate:\n  adapters_in: x\n  text: layer\n  text_layer: 9\ndeepspeed: zero.json")
    _, lines, _ = doctor(capsys)
    assert "error    run.yaml:15: gate.text_layer 9 exceeds the model's 2 layers" in lines


SECTION = "moe:\n  ep_size: 2\n"
MIXED = {  # section moe, the model -> the complaint, its place before it
    "experts, no section": ("", "tiny-vl-moe", "run.yaml: a qwen3_vl_moe model has experts but the run has no moe"),
    "a dense model and the section": (SECTION, "tiny-vl-dense", "run.yaml:6: section moe would not be used"),
    "a text model": (SECTION, "tiny-moe", "run.yaml:2: task gate needs a vision-language model"),
}


def gated_run(section, model):
    """A run of task gate, whose adapters do nothing."""
    for name in ("one", "two"):
        settings = peft.LoraConfig(target_modules=r".*language_model.*q_proj")
        peft.get_peft_model(build_preset("tiny-vl-moe"), settings).save_pretrained(Path("adapters", name))
    chat = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    Path("routed.jsonl").write_text((json.dumps({"messages": chat, "adapter": "one"}) + "\n") * 16)
    edit("tiny-vl-moe", model)
    edit(SECTION, section)
    edit("train: digits", "train: routed.jsonl")
    edit("deepspeed: zero.json", "task: gate\ngate:\n  adapters_in: adapters\ndeepspeed: zero.json")


@pytest.mark.parametrize(("section", "model", "complaint"), MIXED.values(), ids=MIXED)
def test_a_gate_and_its_model_must_agree_on_experts(healthy, capsys, section, model, complaint):
    gated_run(section, model)
    code, lines, _ = doctor(capsys)
    errors = [line for line in lines if line.startswith("error")]
    assert code == 1 and len(errors) == 1 and errors[0].startswith(f"error    {complaint}")
    assert main(["gate", "eval", "run.yaml"]) == 2  # and where it is loaded
    assert capsys.readouterr().err.startswith(f"error: {complaint}")


def test_a_gate_over_experts_needs_zero_3(healthy, capsys):
    gated_run(SECTION, "tiny-vl-moe")
    zero(zero_optimization={"stage": 3})
    code, lines, _ = doctor(capsys)
    assert code == 0 and not any("barely train" in line for line in lines)  # its experts learn nothing
    zero(zero_optimization={"stage": 2})
    code, lines, _ = doctor(capsys)
    text = "task gate freezes all experts, which DeepSpeed cannot do at ZeRO stage 2; use stage 3"
    assert [line for line in lines if line.startswith("error")] == [f"error    run.yaml:13: {text}"]
