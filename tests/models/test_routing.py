"""Which settings plain transformers cannot repeat: exactly those with which its outputs differ from the run's."""

import copy

import pytest
import torch

from ds_moe.config.moe import MoEConfig
from ds_moe.models.convert import convert, moe_layers
from ds_moe.models.presets import build_preset
from ds_moe.models.routing import routed_otherwise, routing_note

# section `moe` -> the settings that are named. tiny-moe's family has norm_topk_prob, here true or false.
SETTINGS = [
    ({}, {}),
    ({"router": {"normalize": True}}, {}),
    ({"router": {"normalize": False}}, {"moe.router.normalize": "false"}),
    ({"router": {"order": "topk_then_softmax"}}, {}),
    ({"router": {"order": "softmax_then_topk"}}, {}),
    ({"router": {"scores": "sigmoid"}}, {"moe.router.scores": "sigmoid"}),
    ({"router": {"groups": 4, "top_groups": 1}}, {"moe.router.groups": 4, "moe.router.top_groups": 1}),
    ({"router": {"groups": 4, "top_groups": 4}}, {}),
    ({"router": {"route_scale": 2.5}}, {"moe.router.route_scale": 2.5}),
    ({"router": {"temperature": 0.5}}, {"moe.router.temperature": 0.5}),
    ({"router": {"kind": "hash"}}, {"moe.router.kind": "hash"}),
    ({"router": {"kind": "balanced"}}, {"moe.router.kind": "balanced"}),
    ({"router": {"kind": "noisy_topk", "jitter_noise": 0.1, "expert_dropout": 0.5, "capacity_factor": 1.0}}, {}),
    (
        {"router": {"kind": "noisy_topk", "scores": "sigmoid", "route_scale": 3.0}},
        {"moe.router.scores": "sigmoid", "moe.router.route_scale": 3.0},
    ),
    ({"router": {"kind": "expert_choice", "allow_noncausal": True}}, {"moe.router.kind": "expert_choice"}),
    ({"experts": {"apply_weight": "before"}}, {"moe.experts.apply_weight": "before"}),
    ({"balance": [{"kind": "aux"}, {"kind": "z_loss"}]}, {}),
    ({"balance": [{"kind": "aux"}, {"kind": "loss_free"}]}, {"moe.balance": "loss_free"}),
]
UNNORMALISED = [  # of a model whose router does not normalise
    ({}, {}),
    ({"router": {"normalize": False}}, {}),
    ({"router": {"normalize": True}}, {"moe.router.normalize": "true"}),
    ({"router": {"order": "topk_then_softmax"}}, {"moe.router.order": "topk_then_softmax"}),
    ({"router": {"order": "topk_then_softmax", "scores": "softmax"}}, {"moe.router.order": "topk_then_softmax"}),
]
CASES = [*((True, *case) for case in SETTINGS), *((False, *case) for case in UNNORMALISED)]


@pytest.mark.parametrize(("normalizes", "section", "named"), CASES)
def test_what_is_named_is_what_differs(normalizes, section, named):
    plain = build_preset("tiny-moe").eval()
    for layer in plain.model.layers:
        layer.mlp.gate.norm_topk_prob = normalizes
    plain.config.norm_topk_prob = normalizes
    ours, config = copy.deepcopy(plain), MoEConfig.model_validate(section)
    convert(ours, config)
    for layer in moe_layers(ours):
        if layer.gate.balancing is not None:
            layer.gate.balancing.bias_E[::3] = 0.2  # as training moves it
    ids = torch.arange(48).view(2, 24)
    with torch.no_grad():
        differs = (plain(ids).logits - ours(ids).logits).abs().max().item()
    assert routed_otherwise(config, plain.config) == named
    assert differs > 1e-4 if named else differs < 1e-6


def test_the_note_names_every_setting():
    config = build_preset("tiny-vl-moe").config
    moe = MoEConfig.model_validate({"router": {"scores": "sigmoid"}, "balance": [{"kind": "loss_free"}]})
    note = routing_note(moe, config)
    assert note is not None
    assert note.startswith(
        "plain transformers cannot repeat moe.router.scores sigmoid, moe.balance loss_free: it sends"
    )
    assert routing_note(MoEConfig(), config) is None and routing_note(None, config) is None
