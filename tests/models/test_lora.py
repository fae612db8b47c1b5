"""ds_moe/models/lora.py: what a model with low-rank updates needs beside them."""

import pytest
import torch

from ds_moe.config.sections import LoRAConfig
from ds_moe.models.blocks import moe_blocks
from ds_moe.models.lora import add_lora
from ds_moe.models.presets import build_preset


@pytest.mark.parametrize("trained", [{"experts": True}, {"train_router": True}], ids=["experts", "routers"])
def test_the_first_layer_s_experts_get_an_input_that_needs_a_gradient(trained):
    """Where it does not, and nothing before them is trained, ZeRO-3 partitions them before their gradients arrive
    (`tests/libraries/test_deepspeed.py`)."""
    model = build_preset("tiny-vl-moe").train()
    add_lora(model, LoRAConfig(rank=8, targets=[], **trained), seed=0)
    needed = []
    block = moe_blocks(model)[0].module
    block.register_forward_pre_hook(lambda _, args: needed.append(args[0].requires_grad))
    model(input_ids=torch.arange(5).unsqueeze(0), use_cache=False).logits.sum().backward()
    assert needed == [True] and not any(one.requires_grad for one in model.model.visual.parameters())
