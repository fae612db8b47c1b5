"""Balancers against loops, and the loss-free bias: what moves it, what does not, and what it may not change."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from ds_moe.config.check import problems
from ds_moe.config.moe import MoEConfig
from ds_moe.config.run import RunConfig
from ds_moe.errors import UserError
from ds_moe.models.convert import EXPERT_BIAS, convert, load_expert_bias, moe_layers
from ds_moe.models.freeze import set_trainable
from ds_moe.models.presets import build_preset
from ds_moe.moe.balance import AuxLoss, Occupancy, TokenStats, ZLoss, global_counts
from ds_moe.moe.decision import RoutingDecision, count_experts
from ds_moe.moe.loss_free import LossFreeBalancing, loss_free, update_biases
from ds_moe.moe.tape import checkpoint_contexts
from tests.moe.test_layer import D, E, make_layer

SCOPES = ("micro_batch", "global_batch", "sequence")
K = 2


def decide(logits_TE, token_V=None, scores="softmax"):
    scores_TE = logits_TE.softmax(-1) if scores == "softmax" else logits_TE.sigmoid()
    token_V = torch.arange(len(logits_TE)) if token_V is None else token_V
    expert_N = scores_TE[token_V].topk(K).indices.flatten()
    token_N = token_V.repeat_interleave(K)
    return RoutingDecision(logits_TE, scores_TE, token_N, expert_N, scores_TE[token_N, expert_N])


def seen_of(decision, sequences, token_V=None):
    counts_E = count_experts(decision.expert_N, decision.logits_TE.shape[1])
    return TokenStats(token_V, sequences, counts_E, global_counts(token_V, len(decision.logits_TE), counts_E))


def slow_aux(decision, sequence_T, real_T, scope):
    """As the papers write it, token by token."""
    tokens, experts = decision.logits_TE.shape
    groups = [[t for t in range(tokens) if real_T[t]]]
    if scope == "sequence":
        groups = [[t for t in groups[0] if sequence_T[t] == b] for b in range(max(sequence_T) + 1)]
    values = []
    for group in filter(None, groups):
        f = [
            sum(int(t) in group for t in decision.token_N[decision.expert_N == i]) / len(group) for i in range(experts)
        ]
        p = [
            sum(decision.scores_TE[t, i] / decision.scores_TE[t].sum() for t in group) / len(group)
            for i in range(experts)
        ]
        values.append(experts * sum(a * b for a, b in zip(f, p, strict=True)))
    return sum(values) / len(values)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize_by_k", [False, True])
def test_balanced_value_is_k_or_1(scope, scores, normalize_by_k):
    """Each token its own pair of experts, in turn: every expert has the same count and the same mean score."""
    logits_TE = torch.zeros(2 * E, E)
    for t in range(2 * E):
        logits_TE[t, [t % E, (t + 1) % E]] = 3.0
    decision = decide(logits_TE, scores=scores)
    loss = AuxLoss(0.5, scope, normalize_by_k).loss(decision, seen_of(decision, 2))
    assert loss.item() == pytest.approx(0.5 * (1 if normalize_by_k else K), rel=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_aux_equals_the_loop_with_padding(scope, scores):
    logits_TE = torch.randn(15, E, dtype=torch.float64, requires_grad=True)
    real_T = torch.ones(15, dtype=torch.bool)
    real_T[3:5] = real_T[10:] = False  # the second sequence is whole, the third has none at all
    token_V = real_T.nonzero().squeeze(1)
    decision = decide(logits_TE, token_V, scores)
    ours = AuxLoss(1.0, scope).loss(decision, seen_of(decision, 3, token_V))
    theirs = slow_aux(decision, [0] * 5 + [1] * 5 + [2] * 5, real_T, scope)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    [one], [other] = (torch.autograd.grad(loss, logits_TE, retain_graph=True) for loss in (ours, theirs))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)
    assert (one[~real_T] == 0).all()


@pytest.mark.parametrize("scope", SCOPES)
def test_aux_of_packed_sequences_equals_the_loop(scope):
    """Sequences of 3, 7, 1 and 2 tokens in one row, of which the last only fills up; backward too."""
    sequence_T = torch.tensor([0] * 3 + [1] * 7 + [2] + [3] * 2)
    logits_TE = torch.randn(13, E, dtype=torch.float64, requires_grad=True)
    token_V = torch.arange(11)
    decision = decide(logits_TE, token_V)
    stats = seen_of(decision, 4, token_V)._replace(sequence_T=sequence_T)
    ours = AuxLoss(1.0, scope).loss(decision, stats)
    theirs = slow_aux(decision, sequence_T.tolist(), sequence_T < 3, scope)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    [one], [other] = (torch.autograd.grad(loss, logits_TE, retain_graph=True) for loss in (ours, theirs))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)
    if scope == "sequence":  # negative control: one token that counts as the next sequence's
        shifted = stats._replace(sequence_T=sequence_T.roll(-1))
        assert abs(AuxLoss(1.0, scope).loss(decision, shifted) - theirs) > 1e-3


def test_all_sequences_of_a_step_weigh_the_same_however_micro_batches_share_them():
    """One sequence in the first micro-batch, three in the second: the mean of both is the mean of the four."""
    sequence_T = torch.tensor([0] * 5 + [1] * 2 + [2] * 4 + [3] * 3)
    decision = decide(torch.randn(14, E))
    aux = AuxLoss(1.0, "sequence")
    expected = aux.loss(decision, seen_of(decision, 4)._replace(sequence_T=sequence_T))
    parts = []
    for first, last in ((0, 5), (5, 14)):
        part = decide(decision.logits_TE[first:last])
        stats = seen_of(part, 4)._replace(sequence_T=sequence_T[first:last], occupancy=Occupancy(4 / 2, 1.0, 1.0))
        parts.append(aux.loss(part, stats))
    torch.testing.assert_close(sum(parts) / 2, expected)


@pytest.mark.parametrize("balancer", [*(AuxLoss(1.0, scope) for scope in SCOPES), ZLoss(1.0)])
def test_micro_batches_of_fillers_do_not_dilute_the_mean(balancer):
    """Two sequences in one micro-batch of four: the mean over the four is its own loss."""
    decision = decide(torch.randn(10, E))
    expected = balancer.loss(decision, seen_of(decision, 2))
    stats = seen_of(decision, 2)._replace(occupancy=Occupancy(2 / 4, 1 / 4, 1 / 4))
    torch.testing.assert_close(balancer.loss(decision, stats) / 4, expected)


def test_z_loss_is_the_mean_square_of_logsumexp_over_real_tokens():
    logits_TE = torch.randn(7, E, requires_grad=True)
    token_V = torch.tensor([0, 2, 5])
    decision = decide(logits_TE, token_V)
    loss = ZLoss(0.1).loss(decision, seen_of(decision, 1, token_V))
    expected = 0.1 * torch.stack([logits_TE[t].exp().sum().log() ** 2 for t in (0, 2, 5)]).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (logits_TE.grad[[1, 3, 4, 6]] == 0).all() and (logits_TE.grad[[0, 2, 5]] != 0).all()


@pytest.mark.parametrize("balancer", [*(AuxLoss(1.0, scope) for scope in SCOPES), ZLoss(1.0)])
def test_all_padding_costs_nothing(balancer):
    logits_TE = torch.randn(4, E, requires_grad=True)
    token_V = torch.empty(0, dtype=torch.int64)
    decision = decide(logits_TE, token_V)
    loss = balancer.loss(decision, seen_of(decision, 2, token_V))
    loss.backward()
    assert loss.item() == 0 and (logits_TE.grad == 0).all()


# --- the loss-free bias


def numpy_update(bias, counts, rate, rule):
    mean = counts.mean()
    if rule == "sign":
        step = np.sign(mean - counts)
    else:
        step = (mean - counts) / mean if mean else 0 * counts
    bias = bias + rate * step
    return bias - bias.mean()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.lists(st.integers(0, 10**9), min_size=5, max_size=5), min_size=1, max_size=4),
    rule=st.sampled_from(["sign", "proportional"]),
)
def test_updates_are_those_of_the_formula_and_have_zero_mean(counts, rule):
    balancing = LossFreeBalancing(5, update_rate=0.01, rule=rule)
    expected = np.zeros(5)
    for row in counts:
        balancing.add(torch.tensor(row))
        balancing.update()
        expected = numpy_update(expected, np.array(row, np.float64), 0.01, rule)
        np.testing.assert_allclose(balancing.bias_E.numpy(), expected, atol=1e-6)
        assert abs(balancing.bias_E.double().sum().item()) < 1e-6
        assert (balancing.counts_E == 0).all() and balancing.bias_E.dtype == torch.float32


def test_an_expert_at_the_mean_stays_and_counts_beyond_fp32_are_told_apart():
    balancing = LossFreeBalancing(3, update_rate=1.0)
    balancing.add(torch.tensor([2**40 - 1, 2**40, 2**40 + 1]))
    balancing.update()
    assert balancing.bias_E.tolist() == [1.0, 0.0, -1.0]


def test_the_rate_is_constant_and_then_falls_to_zero():
    balancing = LossFreeBalancing(4, update_rate=0.5, decay_from=0.8)
    rates = [balancing.rate(progress) for progress in (0, 0.5, 0.8, 0.9, 1.0)]
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.25, 0.0])
    assert LossFreeBalancing(4, update_rate=0.5, decay_from=1.0).rate(1.0) == 0.5


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_the_bias_stays_fp32_bit_for_bit_whatever_the_model_is_cast_to(cast):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), LossFreeBalancing(4))
    exact = torch.tensor([0.5001, -0.2501, 1e-7, -0.25])
    model[1].bias_E.copy_(exact)
    cast(model)
    assert model[0].weight.dtype != torch.float32
    assert model[1].bias_E.dtype == torch.float32 and torch.equal(model[1].bias_E, exact)
    assert model[1].counts_E.dtype == torch.int64
    assert "1.bias_E" in model.state_dict() and "1.counts_E" not in model.state_dict()


def biased_layer(**kwargs):
    layer = make_layer(**kwargs)
    layer.gate.balancing = LossFreeBalancing(E, update_rate=0.02)
    return layer


def test_the_bias_selects_and_never_weighs():
    layer = biased_layer()
    x_TD = torch.randn(9, D)
    plain = layer.gate(x_TD)
    layer.gate.balancing.bias_E[3] = 10.0
    biased = layer.gate(x_TD)
    assert (biased.expert_N.view(-1, K) == 3).any(1).all() and not (plain.expert_N.view(-1, K) == 3).any(1).all()
    scores_NK = torch.stack([biased.scores_TE[t, e] for t, e in zip(*biased.chosen[:2], strict=True)]).view(-1, K)
    torch.testing.assert_close(biased.weight_N.view(-1, K), scores_NK / scores_NK.sum(1, keepdim=True))
    layer.gate.balancing.bias_E.fill_(0.7)  # the same for all: nothing changes
    same = layer.gate(x_TD)
    assert torch.equal(same.expert_N, plain.expert_N) and torch.equal(same.weight_N, plain.weight_N)


def test_the_layer_counts_once_without_padding_evaluation_or_recompute():
    layer = biased_layer(balancers=[AuxLoss(1.0), ZLoss(1.0)])
    x = torch.randn(2, 6, D, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    layer.context.begin(mask, None)
    y = checkpoint(layer, x, use_reentrant=False, context_fn=checkpoint_contexts)
    (y.sum() + sum(layer.context.aux_losses)).backward()
    assert layer.gate.balancing.counts_E.sum() == K * 8 and len(layer.context.aux_losses) == 2
    layer.eval()
    layer(x)
    assert layer.gate.balancing.counts_E.sum() == K * 8


@pytest.mark.parametrize("scope", SCOPES)
def test_a_checkpointed_layer_has_the_same_balancing_gradients(scope):
    plain = biased_layer(balancers=[AuxLoss(1.0, scope), ZLoss(0.1)])
    other = copy.deepcopy(plain)
    x = torch.randn(3, 5, D)
    for layer, context_fn in ((plain, None), (other, checkpoint_contexts)):
        inputs = x.clone().requires_grad_()
        y = (
            layer(inputs)
            if context_fn is None
            else checkpoint(layer, inputs, use_reentrant=False, context_fn=context_fn)
        )
        (y.sum() + sum(layer.context.aux_losses)).backward()
    torch.testing.assert_close(plain.gate.weight.grad, other.gate.weight.grad, rtol=0, atol=0)


def test_the_bias_balances_a_lopsided_router():
    torch.manual_seed(0)
    layer = biased_layer()
    layer.gate.balancing.update_rate = 0.002
    direction_D = torch.randn(D)
    with torch.no_grad():
        layer.gate.weight[0] += 0.05 * direction_D
    x = torch.randn(1, 512, D) + direction_D
    violations = []
    for step in range(300):
        layer(x)
        counts_E = layer.gate.balancing.counts_E.double()
        violations.append((counts_E.max() / counts_E.mean() - 1).item())
        layer.gate.balancing.update(step / 300)
    assert violations[0] > 1 and violations[-1] < 0.1


def test_all_layers_move_together():
    model = build_preset("tiny-vl-moe").train()
    convert(model, MoEConfig(balance=[{"kind": "loss_free", "update_rate": 0.01, "rule": "proportional"}]))
    balancings = loss_free(model)
    assert [layer.gate.balancing for layer in moe_layers(model)] == balancings and len(balancings) == 2
    for balancing in balancings:
        balancing.add(torch.arange(8))
    update_biases(balancings, progress=0.9)
    expected = 0.005 * (3.5 - np.arange(8)) / 3.5
    for balancing in balancings:
        np.testing.assert_allclose(balancing.bias_E.numpy(), expected, atol=1e-8)


def test_an_exported_bias_is_read_where_the_run_uses_one(tmp_path):
    def converted(balance):
        model = build_preset("tiny-vl-moe")
        convert(model, MoEConfig(balance=balance))
        return model

    model, on = converted([{"kind": "loss_free"}]), {"kind": "loss_free"}
    load_expert_bias(model, str(tmp_path))  # a checkpoint of another project has no such file
    names = [name for name, _ in model.named_buffers() if name.endswith("balancing.bias_E")]
    saved = {name: torch.randn(8) for name in names}
    save_file(saved, tmp_path / EXPERT_BIAS)
    load_expert_bias(model, str(tmp_path))
    assert len(saved) == 2 and all(torch.equal(model.get_buffer(name), bias) for name, bias in saved.items())
    load_expert_bias(converted([]), str(tmp_path))
    save_file({name: torch.randn(4) for name in saved}, tmp_path / EXPERT_BIAS)
    with pytest.raises(UserError, match="does not fit"):
        load_expert_bias(converted([on]), str(tmp_path))


# --- the run file


def run_with(**sections):
    moe = sections.pop("moe", {"ep_size": 1})
    return RunConfig(
        model={"preset": "tiny-vl-moe"},
        data={"train": "digits"},
        moe=moe,
        train={"steps": 1, **sections.pop("train", {})},
        deepspeed="none",
        **sections,
    )


def test_the_run_file_refuses_a_bias_that_nothing_would_use():
    balance = [{"kind": "loss_free"}]
    for kind in ("hash", "balanced", "expert_choice"):
        complaints = problems(run_with(moe={"router": {"kind": kind}, "balance": balance}))
        assert any(f"loss_free would not be used: moe.router.kind {kind}" in complaint for complaint in complaints)
    assert not problems(run_with(moe={"router": {"kind": "noisy_topk"}, "balance": balance}))


def test_router_only_trains_the_routers_and_nothing_else():
    config = run_with(train={"stage": "router_only"}, moe={"router": {"kind": "noisy_topk"}})
    model = build_preset("tiny-vl-moe")
    set_trainable(model, config)
    convert(model, config.moe)
    trained = {name.split(".mlp.")[1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"gate.weight", "gate.noise_weight"}
    assert "train.stage router_only needs routers" in problems(run_with(train={"stage": "router_only"}, moe=None))[0]
    fixed = problems(run_with(train={"stage": "router_only"}, moe={"router": {"kind": "hash"}}))
    assert "would train nothing" in fixed[0]
