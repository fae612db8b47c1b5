"""ds_moe/models/head.py against transformers' own loss on logits of all tokens, forward and backward."""

import pytest
import torch
from torch import nn

from ds_moe.config.sections import LoRAConfig
from ds_moe.errors import UserError
from ds_moe.models import head
from ds_moe.models.head import at_labels, label_logprobs
from ds_moe.models.lora import add_lora
from ds_moe.models.presets import build_preset
from tests.models.tiny_families import build

SHAPE = (2, 9)  # of the tokens; 16 of them can have a label
LOSS, GRADIENT = 1e-6, 5e-6


def tokens(model, labelled):
    """Arguments of a forward, and labels at `labelled` places of those that have a token before them."""
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, SHAPE, generator=drawn)
    places = torch.randperm(SHAPE[0] * (SHAPE[1] - 1), generator=drawn)[:labelled]
    kept = torch.zeros(SHAPE[0], SHAPE[1] - 1, dtype=torch.bool)
    kept.view(-1)[places] = True
    labels = torch.full(SHAPE, -100)
    labels[:, 1:][kept] = ids[:, 1:][kept]
    labels[0, 0] = 7  # nothing predicts the first token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def of_transformers(model, inputs, labels, num_items):
    model.zero_grad()
    loss = model(**inputs, labels=labels, use_cache=False, num_items_in_batch=num_items).loss
    loss.backward()
    return loss.item(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def difference(model, inputs, labels):
    """(mean loss, relative to it, gradients, relative to a tensor's largest entry) of ours against transformers'."""
    num_items = max(int((labels[:, 1:] != -100).sum()), 1)
    expected_loss, expected = of_transformers(model, inputs, labels, num_items)
    model.zero_grad()
    loss = at_labels(model, inputs, labels, num_items=num_items).loss
    loss.backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert found.keys() == expected.keys()  # zeros where nothing is labelled, so that all ranks reduce the same
    worst = max((one - expected[n]).abs().max() / expected[n].abs().max().clamp_min(1e-12) for n, one in found.items())
    return abs(loss.item() - expected_loss) / max(expected_loss, 1.0), worst.item()


@pytest.fixture
def small_tiles(monkeypatch):
    """Five rows of the tiny presets' fp32 logits."""

    def rows(model, count=5):
        size = model.get_output_embeddings().weight.shape[0] * 4
        monkeypatch.setitem(head.TILE_BYTES, "cpu", count * size)

    return rows


@pytest.mark.parametrize("labelled", [0, 1, 5, 13, 16])
@pytest.mark.parametrize("preset", ["tiny-vl-moe", "tiny-moe", "tiny-vl-dense"])
def test_loss_and_gradients_are_transformers_own(preset, labelled, small_tiles):
    model = build_preset(preset).train()
    small_tiles(model)
    loss, gradient = difference(model, *tokens(model, labelled))
    assert loss <= LOSS and gradient <= GRADIENT


OF_FAMILIES = {  # what a family makes of its logits, by the keys of a config
    "granitemoe": {"logits_scaling": 6.0},
    "cohere2_moe": {"logit_scale": 0.25},
    "gemma4_text": {"final_logit_softcapping": 0.5},
    "beam": {"final_logit_softcapping": 0.5},
    "inkling_text": {"unpadded_vocab_size": 100},
    "inkling2_text": {"final_logit_softcapping": 0.5, "unpadded_vocab_size": 100},
}


@pytest.mark.parametrize("family", OF_FAMILIES)
def test_what_a_family_makes_of_its_logits_is_in_the_loss(family, small_tiles, monkeypatch):
    """Scales, limits and rows of the output layer that are no tokens."""
    model, _ = build(family, **OF_FAMILIES[family])
    model.set_experts_implementation("eager")
    if family == "inkling_text":  # its layers round by themselves: on one CPU 5.3e-6 in fp32 are 1.2e-6 in float64
        model.double()
    small_tiles(model)
    inputs, labels = tokens(model, 13)
    loss, gradient = difference(model, inputs, labels)
    assert loss <= LOSS and gradient <= GRADIENT
    monkeypatch.setattr(head.LogitsForm, "of", lambda config: head.PLAIN)
    monkeypatch.setattr(head, "_check", lambda *args: None)
    assert difference(model, inputs, labels)[0] > 1000 * LOSS


@pytest.mark.parametrize(("family", "key"), [("granitemoe", "logits_scaling"), ("qwen3_moe", "logit_scale")])
def test_logits_that_the_config_does_not_tell_of_are_an_error(family, key, monkeypatch):
    """One that scales its logits and does not say so, and one that says so and does not."""
    model, _ = build(family)
    setattr(model.config, key, 6.0)
    if family == "granitemoe":
        monkeypatch.setattr(head.LogitsForm, "of", lambda config: head.PLAIN)
    with pytest.raises(UserError, match="MoeForCausalLM computes logits otherwise than its config tells"):
        at_labels(model, *tokens(model, 5))


def test_a_loss_that_the_base_s_config_asks_for_is_not_added():
    """A run says by `moe.balance` what is balanced."""
    model = build_preset("tiny-moe").train()
    inputs, labels = tokens(model, 13)
    without = at_labels(model, inputs, labels, num_items=13).loss
    model.config.output_router_logits = True
    assert at_labels(model, inputs, labels, num_items=13).loss == without
    assert of_transformers(model, inputs, labels, 13)[0] > without


def test_a_shifted_target_and_a_dropped_tile_are_caught(small_tiles, monkeypatch):
    model = build_preset("tiny-moe").train()
    small_tiles(model)
    inputs, labels = tokens(model, 13)
    tiles = head._tiles
    monkeypatch.setattr(head, "_tiles", lambda *args: tiles(*args)[:-1])
    loss, gradient = difference(model, inputs, labels)
    assert loss > 1000 * LOSS and gradient > 1000 * GRADIENT
    monkeypatch.setattr(head, "_tiles", tiles)
    correct = head.label_logprobs
    monkeypatch.setattr(head, "label_logprobs", lambda terms, target_N, *more: correct(terms, target_N.roll(1), *more))
    loss, gradient = difference(model, inputs, labels)
    assert loss > 1000 * LOSS and gradient > 1000 * GRADIENT


def test_other_positions_never_reach_the_output_layer():
    model = build_preset("tiny-vl-moe").eval()
    inputs, labels = tokens(model, 3)
    before = model(**inputs).logits
    seen = []
    hook = model.lm_head.register_forward_hook(lambda _, args, out: seen.append((args[0].shape, out.shape)))
    with torch.no_grad():
        found = at_labels(model, inputs, labels)
    hook.remove()
    assert seen == [((3, 64), (3,))]
    torch.testing.assert_close(found.loss, -found.logits.sum())
    assert torch.equal(model(**inputs).logits, before)  # the model is as it was
    assert model(**inputs, labels=labels).loss.isfinite()


def test_a_forward_that_fails_leaves_the_model_as_it_was():
    model = build_preset("tiny-moe").eval()
    inputs, labels = tokens(model, 3)
    with pytest.raises((TypeError, ValueError)):
        at_labels(model, {"input_ids": None}, labels)
    assert model(**inputs, labels=labels).loss.isfinite() and "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_full_logits(temperature, small_tiles):
    model = build_preset("tiny-moe").eval()
    small_tiles(model)
    inputs, labels = tokens(model, 13)
    found_N = at_labels(model, inputs, labels, temperature=temperature).logits
    found_N.square().sum().backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    kept = labels[:, 1:] != -100
    all_BSV = (model(**inputs).logits[:, :-1].float() / temperature).log_softmax(-1)
    expected_N = all_BSV[kept].gather(1, labels[:, 1:][kept].unsqueeze(1)).squeeze(1)
    expected_N.square().sum().backward()
    torch.testing.assert_close(found_N, expected_N, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, model.lm_head.weight.grad, rtol=0, atol=5e-6 * gradient.abs().max().item())


def test_bf16_is_as_far_from_fp32_as_full_logits_are(small_tiles):
    """Four tiles, whose gradients of the weight are added up in bf16; full logits round one sum."""
    exact = build_preset("tiny-moe").train()
    inputs, labels = tokens(exact, 16)
    loss, expected = of_transformers(exact, inputs, labels, 3.0)
    model = build_preset("tiny-moe").train().bfloat16()
    exact_bf16 = of_transformers(model, inputs, labels, 3.0)
    small_tiles(model, 2)  # four bf16 rows
    model.zero_grad()
    found = at_labels(model, inputs, labels, num_items=3.0).loss
    found.backward()
    assert found.item() == pytest.approx(exact_bf16[0], rel=1e-6)  # the same roundings of the same logits
    for name, parameter in model.named_parameters():
        away = (parameter.grad - expected[name]).norm() / expected[name].norm()
        of_full = (exact_bf16[1][name] - expected[name]).norm() / expected[name].norm()
        assert away <= 1.1 * of_full + 1e-3, name


def test_fp32_logits_of_bf16_weights_are_not_rounded(monkeypatch):
    """Against fp64 products of the same bf16 numbers, five rows a tile; gradients are those of rounded logits but for
    what these round."""
    drawn = torch.Generator().manual_seed(0)
    x_ND, weight_VD = (torch.randn(*shape, generator=drawn).bfloat16() for shape in ((13, 48), (90, 48)))
    target_N = torch.randint(90, (13,), generator=drawn)
    monkeypatch.setitem(head.TILE_BYTES, "cpu", 5 * 90 * 4)
    found = {}
    expected = (x_ND.double() @ weight_VD.double().T / 0.7).log_softmax(-1).gather(1, target_N[:, None])[:, 0]
    for fp32_logits in (True, False):
        x, weight = x_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        logprob_N = label_logprobs([(x, weight)], target_N, 0.7, fp32_logits)
        logprob_N.square().sum().backward()
        found[fp32_logits] = (logprob_N - expected).abs().max().item(), x.grad, weight.grad
    assert found[True][0] < 1e-5 < 1e-2 < found[False][0]
    for ours, rounded in zip(found[True][1:], found[False][1:], strict=True):
        assert ours.dtype == torch.bfloat16 and (ours - rounded).norm() < 0.02 * rounded.norm()


def test_tied_embeddings(small_tiles):
    model = build_preset("tiny-moe").train()
    model.lm_head.weight = model.model.embed_tokens.weight
    small_tiles(model)
    loss, gradient = difference(model, *tokens(model, 13))
    assert loss <= LOSS and gradient <= GRADIENT


def test_lora_on_the_output_layer(small_tiles):
    model = build_preset("tiny-moe").train()
    add_lora(model, LoRAConfig(rank=8, targets=["lm_head", "q_proj"]), seed=0)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    small_tiles(model)
    for labelled in (13, 0):
        loss, gradient = difference(model, *tokens(model, labelled))
        assert loss <= LOSS and gradient <= GRADIENT


def test_a_bias_is_added(small_tiles):
    model = build_preset("tiny-moe").train()
    model.lm_head.bias = nn.Parameter(torch.randn(len(model.lm_head.weight)))
    small_tiles(model)
    loss, gradient = difference(model, *tokens(model, 13))
    assert loss <= LOSS and gradient <= GRADIENT


def test_a_frozen_output_layer_gets_no_gradient():
    x_ND, weight_VD = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3)
    label_logprobs([(x_ND, weight_VD)], torch.tensor([0, 5, 2, 2])).sum().backward()
    assert x_ND.grad.abs().sum() > 0 and weight_VD.grad is None


def test_a_layer_of_another_kind_is_refused():
    model = build_preset("tiny-moe").eval()
    inputs, labels = tokens(model, 3)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match="output layer of type Sequential is not known"):
        at_labels(model, inputs, labels)
