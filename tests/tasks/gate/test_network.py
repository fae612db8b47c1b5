"""The gate: decisions, losses and distances against slow loops and closed forms; gradients; bf16 parameters."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

from ds_moe.tasks.gate.features import Features
from ds_moe.tasks.gate.network import GateDecision, GateNetwork, GateSettings, divergence, entropy, gate_loss, select

B, S, L, K, D = 5, 6, 3, 4, 11
NAN = float("nan")
LABELS, CLASS_WEIGHTS = torch.tensor([2, -100, 0, 3, 2]), torch.tensor([0.5, 3.0, 0.7, 1.9])
PER = [{"per": "example"}, {"per": "layer", "layers": L}, {"per": "token"}]
SHAPES = {"example": (B, K), "layer": (B, L, K), "token": (B, S, K)}
EVERY_SELECT = [{"select": "soft"}, {"select": "top_k", "top_k": 2}, {"select": "hard"}]


def settings(**keys):
    return GateSettings(**{"adapters": K, "hidden_size": D, "width": 9, **keys})


def features(**keys):
    present = torch.tensor([True, False, True, False, True])
    vision = torch.randn(B, D) * present.unsqueeze(1)
    mask = torch.rand(B, S) < 0.6
    mask[:, 0] = True
    return Features(**{"text_BD": torch.randn(B, D), "vision_BD": vision, "present_B": present,
                       "token_RSD": torch.randn(B, S, D), "mask_RS": mask, **keys})  # fmt: skip


def trained(**keys):
    """A gate as after training: no parameter is at a special value."""
    gate = GateNetwork(settings(**keys))
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return gate


def oracle_logits(gate, seen):
    """(B, S or 1, L, K), one sample and token after another, with the concatenation written out."""
    weight = torch.cat([gate.text_in.weight, gate.vision_in.weight], dim=1)
    texts, rows = seen.token_RSD if gate.settings.per == "token" else seen.text_BD.unsqueeze(1), []
    for row in range(B):
        vision = F.layer_norm(seen.vision_BD[row], (D,), gate.vision_norm.weight, gate.vision_norm.bias)
        vision = vision if seen.present_B[row] else gate.no_image
        for text in texts[row]:
            text = F.layer_norm(text, (D,), gate.text_norm.weight, gate.text_norm.bias)
            inputs = torch.cat([text, vision, seen.present_B[row : row + 1].float()])
            rows.append(gate.out.weight @ F.gelu(weight @ inputs + gate.text_in.bias) + gate.out.bias)
    return torch.stack(rows).view(B, texts.shape[1], gate.settings.layers, K)


@pytest.mark.parametrize("per", PER)
def test_logits_against_a_loop(per):
    gate, seen = trained(**per), features()
    decision = gate(seen)
    assert decision.logits.shape == decision.weights.shape == SHAPES[per["per"]]
    torch.testing.assert_close(decision.logits, oracle_logits(gate, seen).view(SHAPES[per["per"]]))
    torch.testing.assert_close(decision.weights, decision.logits.softmax(-1))
    if per["per"] == "token":
        with pytest.raises(ValueError, match="token_RSD"):
            gate(features(token_RSD=None))


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("select_keys", EVERY_SELECT)
def test_a_new_gate_is_near_uniform_and_every_parameter_learns(per, select_keys):
    for temperature in (0.05, 1.0):
        gate = GateNetwork(settings(width=64, temperature=temperature, **per, **select_keys))
        decision = gate(features())
        assert ((decision.logits / temperature).softmax(-1) - 1 / K).abs().max() < 0.15
        (decision.weights * torch.randn(K)).sum().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in gate.parameters())


def test_samples_without_an_image_learn_a_vector_of_their_own_and_the_flag_matters():
    gate, seen = trained(), features()
    junk = seen.vision_BD + torch.randn(B, D) * ~seen.present_B.unsqueeze(1)
    assert gate(dataclasses.replace(seen, vision_BD=junk)).logits.equal(gate(seen).logits)
    for row in range(B):
        gate.zero_grad()
        gate(seen).logits[row].sum().backward()
        learns = gate.no_image.grad.abs().max() > 0, gate.vision_norm.weight.grad.abs().max() > 0
        assert learns == (not seen.present_B[row], seen.present_B[row])
    before = gate(seen).logits
    gate.vision_in.weight.data[:, -1] += 1.0  # of the flag
    assert ((gate(seen).logits - before).abs().amax(1) > 1e-4).equal(seen.present_B)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("modalities", ["both", "text", "vision"])
def test_a_gate_of_one_modality_is_blind_to_the_other(per, modalities):
    gate, seen = trained(modalities=modalities, **per), features()
    text = dataclasses.replace(seen, text_BD=torch.randn(B, D), token_RSD=torch.randn(B, S, D))
    vision = dataclasses.replace(seen, vision_BD=torch.randn(B, D), present_B=~seen.present_B)
    before = gate(seen).logits
    assert before.equal(gate(text).logits) == (modalities == "vision")
    assert before.equal(gate(vision).logits) == (modalities == "text")
    gate(seen).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in gate.parameters())
    gate.load_state_dict(trained(**per).state_dict())  # the same parameters


@pytest.mark.parametrize("per", PER)
def test_bf16_parameters_and_autocast_leave_the_arithmetic_in_fp32(per):
    gate, seen = trained(**per), features()
    half = copy.deepcopy(gate).bfloat16()
    rounded = copy.deepcopy(half).float()
    expected = rounded(seen).logits
    assert half(seen).logits.equal(expected)  # the rounding of the parameters is the only difference
    torch.testing.assert_close(expected, gate(seen).logits, atol=0.1, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert half(seen).logits.equal(expected) and half(seen).weights.dtype == torch.float32
    assert half(features(text_BD=seen.text_BD.bfloat16())).logits.dtype == torch.float32


@pytest.mark.parametrize("top_k", [1, 2, 3, K])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_top_k_against_a_loop(top_k, temperature):
    logits = torch.randn(B, L, K, requires_grad=True)
    weights = select(logits, settings(select="top_k", top_k=top_k, temperature=temperature), training=True)
    for row, made in zip(logits.flatten(0, 1).tolist(), weights.flatten(0, 1), strict=True):
        chosen = sorted(range(K), key=lambda adapter: -row[adapter])[:top_k]
        total = sum(math.exp(row[adapter] / temperature) for adapter in chosen)
        expected = [math.exp(row[adapter] / temperature) / total if adapter in chosen else 0.0 for adapter in range(K)]
        torch.testing.assert_close(made, torch.tensor(expected))
        assert [value == 0 for value in made.tolist()] == [adapter not in chosen for adapter in range(K)]
    (weights * torch.randn(K)).sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad[weights == 0] == 0).all()
    tied = select(torch.zeros(2, K), settings(select="top_k", top_k=top_k), training=True)
    assert (tied > 0).sum(-1).tolist() == [top_k] * 2
    if top_k == K:
        torch.testing.assert_close(weights, select(logits, settings(temperature=temperature), training=True))


def test_hard_is_the_best_one_in_evaluation_and_a_sample_in_training():
    hard = settings(select="hard", temperature=0.7)
    logits = torch.tensor([1.0, -0.5, 0.3, 0.0])
    assert select(logits.expand(B, K), hard, training=False).tolist() == [[1, 0, 0, 0]] * B
    draws = select(logits.expand(20_000, K), hard, training=True)
    assert draws.sum(-1).eq(1).all() and draws.eq(0).sum(-1).eq(K - 1).all()
    torch.testing.assert_close(draws.mean(0), logits.softmax(-1), atol=0.02, rtol=0)  # 5.7 standard deviations


@pytest.mark.parametrize("training", [True, False])
def test_straight_through_has_the_gradient_of_the_softmax(training):
    hard = settings(select="hard", temperature=0.7)
    logits, direction = torch.randn(B, K, requires_grad=True), torch.randn(B, K)
    with torch.random.fork_rng():
        (select(logits, hard, training) * direction).sum().backward()
    noise = -torch.empty(B, K).exponential_().log() if training else torch.zeros(B, K)
    soft = ((logits.detach() + noise) / 0.7).softmax(-1)
    expected = soft * (direction - (soft * direction).sum(-1, keepdim=True)) / 0.7
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("keys", EVERY_SELECT)
def test_nans_show_and_stay_in_their_row(keys):
    logits = torch.tensor([[0.3, 0.1, -0.4, 1.0], [0.3, 0.1, NAN, 1.0]])
    for training in (True, False):
        weights = select(logits, settings(**keys), training)
        assert weights[0].isfinite().all() and weights[1].isnan().all()


def test_per_example_loss_is_torchs_own():
    decision = GateDecision(torch.randn(B, K), torch.empty(0))
    for weight in (None, CLASS_WEIGHTS):
        total = F.cross_entropy(decision.logits, LABELS, weight, ignore_index=-100, reduction="sum")
        torch.testing.assert_close(gate_loss(decision, LABELS, class_weights=weight), total)
    assert gate_loss(decision, LABELS * 0 - 100) == 0


@pytest.mark.parametrize("per", ["layer", "token"])
def test_losses_entropies_and_divergences_are_means_of_layers_or_tokens(per):
    logits, reference = torch.randn(SHAPES[per]), torch.randn(SHAPES[per])
    mask = features().mask_RS & (torch.arange(B) != 3).unsqueeze(1) if per == "token" else None
    loss, entropies, divergences = 0.0, [], []
    for row in range(B):
        own = [index for index in range(logits.shape[1]) if mask is None or mask[row, index]]
        p, q = logits[row, own].softmax(-1), reference[row, own].softmax(-1)
        entropies.append(-(p * p.log()).sum() / max(len(own), 1))
        divergences.append((q * (q / p).log()).sum() / max(len(own), 1))
        if LABELS[row] >= 0 and own:
            loss -= CLASS_WEIGHTS[LABELS[row]] * p[:, LABELS[row]].log().mean()
    decision = GateDecision(logits, logits.softmax(-1))
    torch.testing.assert_close(gate_loss(decision, LABELS, mask, CLASS_WEIGHTS), loss)
    torch.testing.assert_close(entropy(decision.weights, mask), torch.stack(entropies))
    torch.testing.assert_close(divergence(logits, reference, mask), torch.stack(divergences))
    with pytest.raises(ValueError, match="not per token"):
        gate_loss(GateDecision(logits[:, 0], logits[:, 0]), LABELS, torch.ones(B, S).bool())


def test_entropy_and_divergence_closed_forms():
    one_hot = torch.eye(K)[:2].requires_grad_()
    torch.testing.assert_close(entropy(torch.full((2, K), 1 / K)), torch.full((2,), math.log(K)))
    entropy(one_hot).sum().backward()
    assert entropy(one_hot).tolist() == [0, 0] and one_hot.grad.isfinite().all()
    p = torch.tensor([[0.7, 0.1, 0.1, 0.1]])
    assert divergence(p.log() + 3.0, p.log()).abs() < 1e-6
    torch.testing.assert_close(divergence(torch.zeros(1, K), p.log()), math.log(K) - entropy(p))
    collapsed, reference = torch.tensor([[900.0, 0, 0, 0]], requires_grad=True), p.log().requires_grad_()
    (loss := divergence(collapsed, reference)).sum().backward()
    torch.testing.assert_close(loss, 900 * 0.3 - entropy(p), atol=1e-3, rtol=0)
    torch.testing.assert_close(collapsed.grad, torch.tensor([[0.3, -0.1, -0.1, -0.1]]))  # it calls the others back
    assert reference.grad is None


def test_settings_travel_as_json_and_refuse_more_than_all_adapters():
    made = settings(select="top_k", top_k=2, per="layer", layers=L, temperature=0.5)
    assert GateSettings(**json.loads(json.dumps(dataclasses.asdict(made)))) == made
    with pytest.raises(ValueError, match="top_k"):
        settings(select="top_k", top_k=K + 1)
