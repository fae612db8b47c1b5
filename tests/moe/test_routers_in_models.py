"""Routers in layers and models: a recompute repeats all that is random, every kind trains, none leaks the future."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from ds_moe.config.moe import MoEConfig
from ds_moe.errors import UserError
from ds_moe.models.convert import convert
from ds_moe.models.presets import build_preset
from ds_moe.moe.balance import AuxLoss
from ds_moe.moe.context import ForwardContext
from ds_moe.moe.decision import Assignments
from ds_moe.moe.dispatch import LocalDispatcher
from ds_moe.moe.experts import Experts
from ds_moe.moe.layer import MoELayer
from ds_moe.moe.tape import checkpoint_contexts
from tests.devices import by_device
from tests.moe.routing import D, router, states

RANDOM = {
    "topk": {"expert_dropout": 0.4, "jitter_noise": 0.1, "capacity_factor": 0.8, "drop": "score"},
    "noisy_topk": {"expert_dropout": 0.3, "jitter_noise": 0.1},
    "expert_choice": {"expert_dropout": 0.3, "jitter_noise": 0.1},
    "hash": {"expert_dropout": 0.3},
    "balanced": {"expert_dropout": 0.3, "capacity_factor": 0.9},
}


class TwoLayers(torch.nn.Module):
    """Two MoE layers in one checkpointed region, and a dropout between and behind them that draws numbers too."""

    def __init__(self, kind):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        context = ForwardContext()
        self.layers = torch.nn.ModuleList()
        for index in range(2):
            gate_up, down = (
                torch.nn.Parameter(torch.randn(*shape, generator=generator) * 0.3) for shape in ((6, 20, D), (6, D, 10))
            )
            experts = Experts(gate_up, down, "reference")
            gate = router(kind, 6, 2, index, **RANDOM[kind])
            layer = MoELayer(gate, experts, LocalDispatcher(), context, index, balancers=[AuxLoss(0.5)])
            self.layers.append(layer)

    def forward(self, x_BSD):
        for layer in self.layers:
            x_BSD = torch.nn.functional.dropout(x_BSD + layer(x_BSD), 0.2)
        return x_BSD


@by_device
@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_recompute_is_bit_equal_with_all_that_is_random(kind, padded, interrupted, device):
    """`interrupted`: the random state moves between forward and backward, as a second micro-batch would move it."""
    plain, recomputed = TwoLayers(kind).to(device), TwoLayers(kind).to(device)
    x = states(21).view(3, 7, D).to(device)
    mask = torch.ones(3, 7, device=device)
    mask[1, 4:] = 0
    results = []
    for model, again in ((plain, False), (recomputed, True)):
        torch.manual_seed(5)
        model.layers[0].context.begin(mask if padded else None, None)
        x_ = x.clone().requires_grad_()
        y = checkpoint(model, x_, use_reentrant=False, context_fn=checkpoint_contexts) if again else model(x_)
        losses = sum(model.layers[0].context.aux_losses)
        after_forward = torch.get_rng_state()
        if interrupted:
            torch.rand(17)
        (y.square().sum() + losses).backward()
        results.append((y, x_.grad, [p.grad for p in model.parameters() if p.grad is not None], after_forward))
        assert [layer.load.take() is not None for layer in model.layers] == [True, True]
    (y1, x1, grads1, state1), (y2, x2, grads2, state2) = results
    assert torch.equal(y1, y2) and torch.equal(x1, x2) and torch.equal(state1, state2)
    assert len(grads1) == len(grads2) and all(map(torch.equal, grads1, grads2))
    fixed = kind in ("hash", "balanced")
    assert (plain.layers[0].gate.weight.grad is None) == fixed


def test_a_recompute_does_not_depend_on_the_restored_random_state():
    """Also where torch does not restore it: the seed is on the tape. The negative control loses it."""
    gate, x = router("noisy_topk", 6, 2, jitter_noise=0.3), states(9)
    torch.manual_seed(1)
    first = gate.train()(x)
    again = gate(x, None, first.chosen)
    assert torch.equal(first.weight_N, again.weight_N) and torch.equal(first.scores_TE, again.scores_TE)
    lost = gate(x, None, Assignments(first.token_N, first.expert_N))
    assert not torch.equal(first.weight_N, lost.weight_N)


RUNS = {
    "topk": {"scores": "sigmoid", "groups": 4, "top_groups": 2, "capacity_factor": 1.0, "drop": "score"},
    "noisy_topk": {"expert_dropout": 0.2, "jitter_noise": 0.1},
    "expert_choice": {"allow_noncausal": True},
    "hash": {},
    "balanced": {"top_k": 3},
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_converted_model_trains_with_every_kind_recomputed_or_not(kind):
    torch.manual_seed(0)
    ids = torch.randint(20, 200, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    grads = []
    for recomputed in (False, True):
        model = build_preset("tiny-moe").train()
        convert(model, MoEConfig(router={"kind": kind, **RUNS[kind]}))
        if recomputed:
            arguments = {"use_reentrant": False, "context_fn": checkpoint_contexts}
            model.activation_checkpointing_enable(arguments)
        torch.manual_seed(1)
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name
    gates = [name.rpartition(".")[2] for name in grads[0] if ".gate." in name]
    expected = {"noisy_topk": ["noise_weight", "weight"], "hash": [], "balanced": []}.get(kind, ["weight"])
    assert sorted(set(gates)) == expected  # a gate that is not used is frozen: no decay, no moments
    assert all(grad.abs().max() > 0 for name, grad in grads[0].items() if ".gate." in name)


def test_expert_choice_is_refused_where_it_would_leak_or_generate():
    with pytest.raises(UserError, match="leaks the future"):
        convert(build_preset("tiny-moe"), MoEConfig(router={"kind": "expert_choice"}))
    model = build_preset("tiny-moe").eval()
    convert(model, MoEConfig(router={"kind": "expert_choice", "allow_noncausal": True}))
    ids = torch.randint(20, 200, (1, 6))
    assert model(input_ids=ids, labels=ids).loss.isfinite()
    for use_cache in (True, False):
        with pytest.raises(UserError, match="expert_choice cannot generate"):
            model.generate(input_ids=ids, max_new_tokens=2, use_cache=use_cache)
    with pytest.raises(UserError, match="expert_choice cannot generate"):
        model(input_ids=ids, past_key_values=DynamicCache(config=model.config))
