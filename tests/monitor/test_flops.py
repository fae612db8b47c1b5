"""What a patch of an image costs beside a token: by it packed rows are balanced over the ranks."""

import pytest
from transformers import PretrainedConfig

from ds_moe.models.load import build_outline
from ds_moe.models.presets import preset_config
from ds_moe.monitor.flops import active_flops_per_token, patch_cost


def outline(name="tiny-vl-moe"):
    return build_outline(preset_config(name))


def counted(model, *parts):
    return sum(one.numel() for name, one in model.named_parameters() if any(part in name for part in parts))


def test_a_patch_meets_the_layers_of_the_tower_and_a_share_of_its_mergers():
    model = outline()
    in_layers, all_of_it = counted(model, "visual.blocks."), counted(model, "visual.")
    merged: PretrainedConfig = model.config.vision_config
    met = in_layers + (all_of_it - in_layers) / merged.spatial_merge_size**2
    assert patch_cost(model) == pytest.approx(6 * met / active_flops_per_token(model))


def test_a_frozen_tower_runs_forward_alone_and_a_text_model_has_none():
    model = outline()
    trained = patch_cost(model)
    for name, parameter in model.named_parameters():
        if "visual." in name:
            parameter.requires_grad = False
    assert patch_cost(model) == pytest.approx(trained / 3)
    assert patch_cost(outline("tiny-moe")) == 0.0


def test_a_token_meets_neither_embedding_nor_output_layer():
    model = outline("tiny-moe")
    experts = counted(model, ".experts.")
    met = counted(model, "") - counted(model, "embed_tokens", "lm_head") - experts
    config = model.config
    assert active_flops_per_token(model) == 6 * (met + experts * config.num_experts_per_tok / config.num_experts)
