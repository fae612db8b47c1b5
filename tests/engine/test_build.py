"""ds_moe/engine/build.py: what needs no engine."""

import torch

from ds_moe.config.moe import MoEConfig
from ds_moe.config.sections import TrainConfig
from ds_moe.engine.build import _leaves, scheduler_factory
from ds_moe.models.convert import convert, moe_layers
from ds_moe.models.presets import build_preset
from ds_moe.moe.all_to_all import ExpertParallel


def test_a_constant_schedule_warms_up():
    """transformers' own of this name does not (`tests/libraries/test_transformers.py`)."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    config = TrainConfig(steps=10, global_batch_size=1, schedule="constant", warmup_steps=2)
    schedule, rates = scheduler_factory(config, 10)(optimizer), []
    for _ in range(4):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates == [0.0, 0.5, 1.0, 1.0]


def test_leaves_of_zero_3_are_the_layers_with_experts_alone():
    """Layers of a vision tower as leaves lost gradients (Aria's; `tests/distributed/test_families.py`, images)."""
    model = build_preset("tiny-vl-moe")
    convert(model, MoEConfig(), ExpertParallel())
    assert _leaves(model, moe_layers(model)) == list(model.model.language_model.layers)
