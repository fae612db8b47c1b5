"""ds_moe/models/matrices.py: what Muon trains of a model."""

import pytest

from ds_moe.config.run import RunConfig
from ds_moe.config.sections import ModelConfig
from ds_moe.errors import UserError
from ds_moe.models.convert import convert_for
from ds_moe.models.freeze import set_trainable
from ds_moe.models.load import build_outline, model_config
from ds_moe.models.matrices import hidden_matrices


def run(preset, **more):
    train = {"optimizer": "muon", "steps": 1}
    return RunConfig(model={"preset": preset, **more.pop("model", {})}, data={"train": "digits"}, deepspeed="zero3",
                     train=train, **more)  # fmt: skip


def outline(config):
    built = build_outline(model_config(ModelConfig(preset=config.model.preset)))
    set_trainable(built, config)
    return built


@pytest.mark.parametrize("preset", ["tiny-vl-moe", "tiny-qwen3.5-moe"])
def test_matrices_of_hidden_layers(preset):
    """The same before and after conversion."""
    config = run(preset, moe={"ep_size": 1})
    model = outline(config)
    before = hidden_matrices(model)
    parts = {name.rpartition("layers.")[2].partition(".")[2] for name in before if "language_model" in name}
    assert {"self_attn.q_proj.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"} <= parts
    others = set(dict(model.named_parameters())) - set(before)
    for kept in ("embed_tokens", "lm_head", "mlp.gate.", "norm", "bias", "patch_embed", "pos_embed"):
        assert any(kept in name for name in others) and not any(kept in name for name in before)
    if preset == "tiny-qwen3.5-moe":
        assert any("shared_expert_gate" in name for name in others) and any("conv1d" in name for name in others)
    experts = before["model.language_model.layers.1.mlp.experts.gate_up_proj"]
    assert (experts.count, experts.parts, experts.dim, experts.interleaved) == (8, 2, -2, False)
    assert before["model.visual.blocks.0.attn.qkv.weight"].parts == 3
    convert_for(model, config)
    assert hidden_matrices(model) == before


def test_updates_of_low_rank():
    config = run("tiny-vl-moe", moe={"ep_size": 1}, lora={"rank": 4, "experts": True})
    found = hidden_matrices(outline(config))
    parts = {name.rpartition("experts.lora.")[2]: stack.parts for name, stack in found.items() if "experts" in name}
    assert parts == {"gate_up_A": 1, "gate_up_B": 2, "down_A": 1, "down_B": 1}
    config = run("tiny-vl-moe", moe={"ep_size": 1}, lora={"rank": 1, "experts": True})
    with pytest.raises(UserError, match="nothing that is trained is a matrix of a hidden layer"):
        outline(config)


def test_the_update_of_a_fused_layer_is_as_many_matrices():
    """Of B, whose rows are the layer's; A is one matrix."""
    config = run("tiny-vl-moe", moe={"ep_size": 1}, lora={"rank": 4, "targets": ["qkv"]})
    found = hidden_matrices(outline(config))
    assert {name.split(".")[-3]: stack.parts for name, stack in found.items()} == {"lora_A": 1, "lora_B": 3}


def test_nothing_left_for_muon_is_refused():
    config = run("tiny-vl-moe", moe={"ep_size": 1}, model={"freeze": [r"^(?!.*(norm|embed_tokens))"]})
    with pytest.raises(UserError, match="train.optimizer muon: nothing that is trained"):
        outline(config)
