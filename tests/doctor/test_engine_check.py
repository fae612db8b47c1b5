"""What the doctor says of rl.engine."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ds_moe.models.presets import build_preset
from ds_moe.models.processor import save_processor, tiny_processor
from tests.doctor.broken_run import BASE, doctor, edit, square_in_hub_layout
from tests.rollout.fake_vllm import FakeVllm

ENGINE = "rl: {engine: {kind: local, prompts: 16, completions: 4, max_new_tokens: 8}}\n"


@pytest.fixture
def engine(healthy):
    Path("run.yaml").write_text(f"task: rl\n{ENGINE}{BASE}")


def test_an_engine_of_this_machine(engine, capsys):
    code, lines, output = doctor(capsys)
    assert code == 0 and not lines, output
    assert "rounds: 16 prompts x 4 completions, 4 steps each, 25 rounds" in output
    assert "engine: plain transformers on the host of rank 0, fp32" in output
    assert re.search(r"weights for the engine: [\d.]+ [kM]B each, in ", output)


def test_a_model_that_files_of_the_hub_cannot_hold_is_refused(engine, capsys):
    square_in_hub_layout()
    _, lines, _ = doctor(capsys)
    assert any(
        "rl.engine cannot be given the weights of this model in hub layout: hidden_size 64" in one for one in lines
    )


def test_a_model_that_routes_otherwise_is_refused(engine, capsys):
    edit("  ep_size: 2", "  ep_size: 2\n  balance: [{kind: loss_free}]")
    _, lines, _ = doctor(capsys)
    assert any("rl.engine would sample from another model: plain transformers cannot repeat" in one for one in lines)


def test_updates_of_a_tied_output_layer_are_refused_unless_its_files_hold_it(engine, capsys):
    model = build_preset("tiny-vl-moe")
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained("model")
    save_processor(tiny_processor("vl"), "model")
    edit("preset: tiny-vl-moe", "path: model")
    edit("deepspeed:", "lora: {rank: 8, targets: [q_proj, lm_head], experts: true}\ndeepspeed:")
    refusal = "rl.engine is given one weight for both, which cannot hold the update (leave lm_head out of lora.targets)"
    _, lines, _ = doctor(capsys)
    assert [one for one in lines if refusal in one] == lines and lines, lines
    head = model.get_input_embeddings().weight.detach().flip(0).contiguous()
    weights = load_file("model/model.safetensors") | {"lm_head.weight": head}
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    _, lines, _ = doctor(capsys)
    assert not any(refusal in one for one in lines), lines


def test_servers_are_asked_and_their_settings_named(engine, capsys):
    with FakeVllm(settings={"max_model_len": 64}) as fake:
        edit("kind: local", f"urls: [{fake.url}]")
        code, lines, output = doctor(capsys)
        assert code == 0 and fake.url in output, output
    with FakeVllm(settings={"max_model_len": 32}) as fake:
        text = Path("run.yaml").read_text()
        edit(text[text.index("http") : text.index("], prompts")], fake.url)
        _, lines, _ = doctor(capsys)
        assert any(f"{fake.url}: --max-model-len is 32" in one for one in lines), lines
    edit("prompts: 16", "wait_s: 0.5, prompts: 16")
    code, lines, _ = doctor(capsys)
    assert code == 1 and any("no server of rl.engine.urls answers" in one for one in lines), lines
