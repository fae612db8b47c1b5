"""Every router against an independent loop in NumPy, its gradients against finite differences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.devices import by_device
from tests.moe.routing import PLAIN, D, logits_of, oracle_topk, quick, router, same, softmax, some_tokens, states, table


@st.composite
def topk_cases(draw):
    groups = draw(st.sampled_from([None, 1, 2, 4]))
    experts = draw(st.integers(1, 4)) * (groups or 1) if groups else draw(st.integers(1, 9))
    top_groups = None if groups is None else draw(st.integers(1, groups))
    reachable = experts if groups is None else top_groups * experts // groups
    scores = draw(st.sampled_from(["softmax", "sigmoid"]))
    order = (
        "softmax_then_topk"
        if scores == "sigmoid"
        else draw(st.sampled_from(["softmax_then_topk", "topk_then_softmax"]))
    )
    keys = {
        "scores": scores,
        "order": order,
        "normalize": draw(st.booleans()),
        "route_scale": draw(st.sampled_from([1.0, 2.5])),
        "groups": groups,
        "top_groups": top_groups,
        "temperature": draw(st.sampled_from([1.0, 0.5, 3.0])),
    }
    top_k = draw(st.sampled_from(sorted({1, min(2, reachable), reachable})))
    return experts, top_k, keys, draw(st.integers(0, 9)), draw(st.integers(0, 10**6)), draw(st.floats(0, 1))


@by_device
@quick
@given(case=topk_cases())
def test_topk_is_what_the_papers_say(case, device):
    experts, top_k, keys, tokens, seed, share = case
    gate, x = router("topk", experts, top_k, seed, **keys).to(device), states(tokens, seed).to(device)
    token_V = some_tokens(tokens, seed, share)
    token_V = None if token_V is None else token_V.to(device)
    decision = gate(x, token_V)
    real = range(tokens) if token_V is None else token_V.tolist()
    expected = {t: oracle_topk(logits_of(gate, x)[t], top_k, **keys) for t in real}
    same(decision, expected)
    assert decision.scores_TE.dtype == decision.weight_N.dtype == torch.float32
    if keys["normalize"] or keys["order"] == "topk_then_softmax":
        for weights in table(decision).values():
            assert sum(weights.values()) == pytest.approx(keys["route_scale"], rel=1e-5)


def test_a_bias_moves_the_choice_of_groups_and_experts_but_no_weight():
    """DeepSeek-V3's router: sigmoid, groups, scale, and a bias that selects only."""
    keys = PLAIN | {"scores": "sigmoid", "groups": 4, "top_groups": 2, "route_scale": 2.5}
    gate, x = router("topk", 8, 2, **keys), states(20)
    bias = torch.linspace(-0.8, 0.8, 8)
    plain = table(gate(x))
    gate.balancing = lambda scores_TE: scores_TE + bias
    expected = {t: oracle_topk(row, 2, **keys, bias=bias.numpy()) for t, row in enumerate(logits_of(gate, x))}
    decision = gate(x)
    same(decision, expected)
    assert {t: set(e) for t, e in plain.items()} != {t: set(e) for t, e in table(decision).items()}


def test_normalised_weights_stay_finite_where_a_bias_selects_experts_of_score_zero():
    gate = router("topk", 4, 2)
    gate.balancing = lambda scores_TE: torch.tensor([0.0, 0.0, 9.0, 9.0]).expand_as(scores_TE)
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([500.0, 0.0, 0.0, 0.0]).unsqueeze(1).expand(4, D))
    decision = gate(torch.ones(3, D))
    decision.weight_N.sum().backward()
    assert decision.weight_N.isfinite().all() and gate.weight.grad.isfinite().all()


@quick
@given(st.integers(2, 8), st.integers(0, 12), st.floats(0.1, 4), st.integers(0, 10**6), st.floats(0, 1), st.data())
def test_expert_choice_takes_each_experts_best_tokens(experts, tokens, factor, seed, share, data):
    top_k = data.draw(st.sampled_from(sorted({1, experts})))
    gate, x = router("expert_choice", experts, top_k, seed, capacity_factor=factor), states(tokens, seed)
    token_V = some_tokens(tokens, seed, share)
    real = list(range(tokens)) if token_V is None else token_V.tolist()
    count = min(len(real), math.ceil(round(factor * len(real) * top_k / experts, 6)))
    scores = np.array([softmax(row) for row in logits_of(gate, x)]).reshape(tokens, experts)
    expected = {}
    for expert in range(experts):
        for token in sorted(real, key=lambda token: -scores[token, expert])[:count]:
            expected.setdefault(token, {})[expert] = scores[token, expert]
    same(gate(x, token_V), expected)


@quick
@given(st.sampled_from(["hash", "balanced"]), st.integers(1, 12), st.integers(0, 30), st.integers(0, 99), st.data())
def test_fixed_routers_give_k_distinct_experts_of_equal_weight(kind, experts, tokens, seed, data):
    top_k = data.draw(st.sampled_from(sorted({1, min(2, experts), experts})))
    gate, x, token_V = router(kind, experts, top_k), states(tokens), some_tokens(tokens, seed, 0.8)
    decision = gate(x, token_V)
    real = range(tokens) if token_V is None else token_V.tolist()
    assert {token: len(found) for token, found in table(decision).items()} == dict.fromkeys(real, top_k)
    assert (decision.weight_N == 1 / top_k).all() and not decision.weight_N.requires_grad
    assert torch.equal(decision.expert_N, gate(states(tokens, seed=7), token_V).expert_N), "no look at hidden states"
    if kind == "balanced":
        counts = torch.bincount(decision.expert_N, minlength=experts)
        assert counts.max() - counts.min() <= 1


def murmur(value):
    """MurmurHash3's finalizer in Python's unbounded integers."""
    value = (value ^ (value >> 16)) * 0x85EBCA6B % 2**32
    value = (value ^ (value >> 13)) * 0xC2B2AE35 % 2**32
    return value ^ (value >> 16)


@pytest.mark.parametrize("experts, top_k", [(8, 2), (9, 9), (1, 1), (128, 8)])
def test_hash_is_the_same_everywhere_and_spreads(experts, top_k):
    tokens = 512 * experts // top_k
    ids_TK = router("hash", experts, top_k)(states(tokens)).expert_N.view(-1, top_k)
    strides = [stride for stride in range(1, experts + 1) if math.gcd(stride, experts) == 1]
    for token in (0, 1, 7, tokens - 1):
        start, stride = murmur(token), strides[murmur((murmur(token) + 1) % 2**32) % len(strides)]
        assert ids_TK[token].tolist() == [(start + stride * k) % experts for k in range(top_k)]
    counts = torch.bincount(ids_TK.flatten(), minlength=experts)
    assert (counts - 512).abs().max() < 5 * 512**0.5  # sd 22.6 of draws by chance


@by_device
@pytest.mark.parametrize(
    "kind, keys",
    [
        ("topk", {}),
        ("topk", {"normalize": False, "route_scale": 2.5}),
        ("topk", {"scores": "sigmoid", "temperature": 0.7}),
        ("topk", {"order": "topk_then_softmax", "temperature": 2.0}),
        ("topk", {"capacity_factor": 0.5}),
        ("noisy_topk", {"jitter_noise": 0.1}),
        ("noisy_topk", {"expert_dropout": 0.4, "scores": "sigmoid"}),
        ("expert_choice", {"jitter_noise": 0.2}),
    ],
)
def test_gradients_equal_finite_differences(kind, keys, device):
    gate = router(kind, 5, 3, **keys).double().train().to(device)
    x = states(6).double().to(device).requires_grad_()
    token_V = torch.tensor([0, 2, 3, 5], device=device)
    chosen = gate(x, token_V).chosen
    parameters = list(gate.parameters())

    def weights(x_TD, *values):
        state = dict(zip((name for name, _ in gate.named_parameters()), values, strict=True))
        return torch.func.functional_call(gate, state, (x_TD, token_V, chosen)).weight_N

    assert torch.autograd.gradcheck(weights, (x, *parameters))
    if kind == "noisy_topk":
        grads = torch.autograd.grad(weights(x, *parameters).square().sum(), parameters)
        assert all(grad.abs().max() > 0 for grad in grads)  # the noise is trained too


def test_noise_is_drawn_in_training_only_and_with_the_width_that_was_learned():
    gate, x = router("noisy_topk", 4, 2, noise_std=2.0), states(3000)
    assert torch.equal(gate.eval()(x).scores_TE, router("topk", 4, 2)(x).scores_TE)
    noisy = gate.train()(x).scores_TE.detach().double().log()
    clean = torch.tensor(logits_of(gate, x))
    width = 2.0 * torch.nn.functional.softplus(x.double() @ gate.noise_weight.detach().double().T)
    # log softmax is the noisy logits less a constant of the token: compare differences of experts
    noise = (noisy - clean) - (noisy - clean)[:, :1]
    z = noise[:, 1] / (width[:, 0] ** 2 + width[:, 1] ** 2).sqrt()
    assert abs(z.mean().item()) < 0.06 and z.std().item() == pytest.approx(1, abs=0.05)  # 3 sd of 3000 draws


def test_padding_gets_no_noise_gradient_and_no_assignment():
    gate = router("noisy_topk", 4, 2).train()
    decision = gate(states(5), torch.empty(0, dtype=torch.int64))
    decision.weight_N.sum().backward()
    assert decision.token_N.numel() == 0 and gate.weight.grad.abs().max() == 0


def test_a_given_choice_is_weighed_with_live_scores():
    """Replay: the selection is another router's, the weights are this one's."""
    gate, x = router("topk", 6, 2), states(7)
    other = router("topk", 6, 2, seed=9)(x).chosen
    decision = gate(x, None, other)
    scores = decision.scores_TE.detach()
    assert torch.equal(decision.expert_N, other.expert_N)
    expected = scores.gather(1, other.expert_N.view(-1, 2))
    torch.testing.assert_close(decision.weight_N.view(-1, 2), expected / expected.sum(1, keepdim=True))


@pytest.mark.parametrize(
    "keys",
    [
        {"groups": 4, "top_groups": None},
        {"groups": 3, "top_groups": 1},
        {"groups": 4, "top_groups": 5},
        {"groups": 8, "top_groups": 1},
        {"scores": "sigmoid", "order": "topk_then_softmax"},
    ],
)
def test_what_a_router_cannot_do_is_refused(keys):
    with pytest.raises(ValueError):
        router("topk", 8, 2, **keys)


def test_the_oracles_notice_a_wrong_router():
    gate, x = router("topk", 6, 2), states(9)
    expected = {t: oracle_topk(row, 2, **PLAIN) for t, row in enumerate(logits_of(gate, x))}
    same(gate(x), expected)
    same(router("topk", 6, 2, groups=6, top_groups=2)(x), expected)  # groups of one are no limit
    for wrong in ({"normalize": False}, {"temperature": 1.1}, {"route_scale": 1.01}, {"groups": 2, "top_groups": 1}):
        with pytest.raises(AssertionError):
            same(router("topk", 6, 2, **wrong)(x), expected)
