"""Every router against an independent loop in NumPy, its gradients against finite differences, its recompute."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
from ds_moe.moe.parts import make_router
from ds_moe.moe.routers.limits import survives_dropout
from ds_moe.moe.standalone import ExpertChoiceRouter, ExpertRouter, LoadBalancingLoss
from ds_moe.moe.tape import checkpoint_contexts
from tests.devices import by_device

D = 12
quick = settings(max_examples=60, deadline=None, derandomize=True)


def router(kind, experts, top_k, seed=0, **keys):
    weight = 0.4 * torch.randn(experts, D, generator=torch.Generator().manual_seed(seed))
    made = make_router(kind, torch.nn.Parameter(weight), top_k, **keys)
    if kind == "noisy_topk":
        torch.nn.init.normal_(made.noise_weight, generator=torch.Generator().manual_seed(seed + 1))
    return made


def states(tokens, seed=0):
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed + 100))


def table(decision):
    """{token: {expert: weight}}; no pair may come twice."""
    pairs = list(zip(decision.token_N.tolist(), decision.expert_N.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs), "an expert twice in one token"
    found = {}
    for (token, expert), weight in zip(pairs, decision.weight_N.tolist(), strict=True):
        found.setdefault(token, {})[expert] = weight
    return found


def same(decision, expected):
    ours = table(decision)
    assert {token: set(experts) for token, experts in ours.items()} == {t: set(e) for t, e in expected.items()}
    for token, experts in expected.items():
        for expert, weight in experts.items():
            assert ours[token][expert] == pytest.approx(weight, rel=2e-5, abs=1e-7)


# --- the oracles: float64, one token at a time, as the papers write it


def softmax(values):
    values = np.exp(values - values.max())
    return values / values.sum()


def logits_of(gate, x_TD):
    return x_TD.cpu().double().numpy() @ gate.weight.detach().cpu().double().numpy().T


def oracle_topk(logits, top_k, *, scores, order, normalize, route_scale, groups, top_groups, temperature, bias=0.0):
    """One token: {expert: weight}."""
    logits = logits / temperature
    all_scores = 1 / (1 + np.exp(-logits)) if scores == "sigmoid" else softmax(logits)
    ranked = all_scores + bias
    allowed = range(len(logits))
    if groups is not None:
        members = np.array_split(np.arange(len(logits)), groups)
        best = sorted(range(groups), key=lambda g: -sum(sorted(ranked[members[g]])[-2:]))[:top_groups]
        allowed = [expert for group in best for expert in members[group]]
    chosen = sorted(allowed, key=lambda expert: -ranked[expert])[:top_k]
    if order == "topk_then_softmax":
        weights = softmax(logits[chosen])  # literally; ours divides the scores
    else:
        weights = all_scores[chosen] / (all_scores[chosen].sum() if normalize else 1)
    return {int(expert): weight * route_scale for expert, weight in zip(chosen, weights, strict=True)}


PLAIN = {
    "scores": "softmax",
    "order": "softmax_then_topk",
    "normalize": True,
    "route_scale": 1.0,
    "groups": None,
    "top_groups": None,
    "temperature": 1.0,
}


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


def some_tokens(tokens, seed, share):
    """Indices of the real tokens, none of them to all; None where all are, half of the time."""
    real = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < share
    return None if bool(real.all()) and seed % 2 else real.nonzero().squeeze(1)


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


# --- capacity and dropout


@quick
@given(st.integers(1, 6), st.integers(0, 25), st.floats(0.1, 2), st.sampled_from(["position", "score"]), st.data())
def test_capacity_refuses_the_later_or_the_lower(experts, tokens, factor, drop, data):
    top_k = data.draw(st.sampled_from(sorted({1, min(2, experts), experts})))
    seed, normalize = data.draw(st.integers(0, 10**6)), data.draw(st.booleans())
    limited = router("topk", experts, top_k, seed, normalize=normalize, capacity_factor=factor, drop=drop)
    x, token_V = states(tokens, seed), some_tokens(tokens, seed, 0.8)
    decision, whole = limited(x, token_V), router("topk", experts, top_k, seed)(x, token_V)
    routed = tokens if token_V is None else token_V.numel()
    limit = math.ceil(round(factor * routed * top_k / experts, 6))
    scores, kept = whole.scores_TE.detach().numpy(), {}
    for expert in range(experts):
        rows = whole.token_N[whole.expert_N == expert].tolist()
        for token in sorted(rows, key=lambda t: t if drop == "position" else -scores[t, expert])[:limit]:
            kept.setdefault(token, {})[expert] = float(scores[token, expert])
    if normalize:  # over what is kept
        kept = {t: {e: weight / sum(found.values()) for e, weight in found.items()} for t, found in kept.items()}
    same(decision, kept)
    assert decision.dropped == whole.token_N.numel() - decision.token_N.numel()
    assert torch.bincount(decision.expert_N, minlength=experts).max() <= limit


@quick
@given(st.integers(0, 40), st.floats(0, 0.99), st.integers(0, 10**6))
def test_dropout_never_takes_all_of_a_token(tokens, probability, seed):
    for kind in ("topk", "expert_choice", "hash"):
        gate = router(kind, 6, 3, seed, expert_dropout=probability)
        whole = gate.eval()(states(tokens, seed))
        torch.manual_seed(seed)
        decision = gate.train()(states(tokens, seed))
        assert set(table(decision)) == set(table(whole))
        for token, experts in table(decision).items():
            assert set(experts) <= set(table(whole)[token])
            if kind == "topk":
                assert sum(experts.values()) == pytest.approx(1, rel=1e-5)
        assert decision.dropped == 0 and gate.eval()(states(tokens, seed)).seed is None


def test_dropout_drops_the_share_it_says():
    token_N = torch.arange(4000).repeat_interleave(8)
    kept = survives_dropout(token_N, 4000, 0.25, torch.Generator().manual_seed(0))
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.008)  # sd .0024; 2e-5 of the tokens are rescued


def test_a_full_layer_may_leave_a_token_without_expert_but_not_in_evaluation():
    gate = router("topk", 4, 2, capacity_factor=0.25)
    assert gate.eval()(states(16)).token_N.numel() == 32
    decision = gate.train()(states(16))
    assert decision.dropped == 32 - decision.token_N.numel() > 0
    assert len(table(decision)) < 16  # these tokens pass by the experts: the residual stream carries them


# --- gradients


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


# --- recompute

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


# --- the names people look for


@pytest.mark.parametrize("gating_type", ["softmax", "sigmoid", "noisy_top_k"])
def test_expert_router_gives_weights_indices_and_a_loss(gating_type):
    torch.manual_seed(0)
    noise = {"noise_std": 0.5} if gating_type == "noisy_top_k" else {}
    front = ExpertRouter(D, 6, 2, gating_type, temperature=0.8, **noise).eval()
    x = states(12).view(3, 4, D)
    weights, indices, loss = front(x)
    scores = "sigmoid" if gating_type == "sigmoid" else "softmax"
    keys = PLAIN | {"scores": scores, "temperature": 0.8}
    for token, row in enumerate(logits_of(front.router, x.view(-1, D))):
        expected = oracle_topk(row, 2, **keys)
        found = dict(zip(indices.view(-1, 2)[token].tolist(), weights.view(-1, 2)[token].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-5)
    assert weights.shape == indices.shape == (3, 4, 2)
    if gating_type == "softmax":
        logits = torch.tensor(logits_of(front.router, x)).float() / 0.8
        assert LoadBalancingLoss(6, "standard", 1.0)(logits, indices).item() == pytest.approx(loss.item(), rel=1e-5)
    (weights.square().sum() + loss).backward()
    assert front.router.weight.grad.abs().max() > 0


def test_expert_router_marks_slots_without_an_expert():
    front = ExpertRouter(D, 6, 3, expert_dropout=0.6).train()
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    weights, indices, _ = front(states(10).view(2, 5, D), mask)
    assert ((indices >= 0).sum(-1).bool() == mask.bool()).all() and ((indices < 0) == (weights == 0)).all()
    torch.testing.assert_close(weights.sum(-1), mask)
    assert (indices < 0).sum() > 6  # dropout took something beside the padding


def test_expert_choice_router_gives_each_experts_tokens():
    front = ExpertChoiceRouter(D, 4, capacity_factor=2.0)
    weights, tokens, scores = front(states(10).view(2, 5, D))
    assert weights.shape == tokens.shape == (4, 5) and scores.shape == (10, 4)
    assert torch.equal(weights, scores.t().gather(1, tokens)) and torch.equal(weights, scores.t().topk(5).values)


def test_load_balancing_losses_by_hand():
    logits = states(6)[:, :4].view(2, 3, 4).clone().requires_grad_()
    indices = logits.topk(2).indices
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    scores = logits.detach().double().softmax(-1).numpy()

    def aux(cells):
        used, mean = np.zeros(4), np.zeros(4)
        for cell in cells:
            used[indices[cell].numpy()] += 1 / len(cells)
            mean += scores[cell] / len(cells)
        return 4 * (used * mean).sum()

    first, second = [(0, 0), (0, 1), (0, 2)], [(1, 0)]
    expected = {"standard": aux(first + second), "sequence": (aux(first) + aux(second)) / 2}
    expected["z_loss"] = np.mean([np.log(np.exp(logits[c].detach().numpy()).sum()) ** 2 for c in first + second])
    for kind, value in expected.items():
        loss = LoadBalancingLoss(4, kind, 0.1)(logits, indices, mask)
        assert loss.item() == pytest.approx(0.1 * value, rel=1e-5)
        loss.backward(retain_graph=True)
    assert logits.grad[1, 1:].abs().max() == 0


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="gating_type"):
        ExpertRouter(D, 4, 2, "magic")
    with pytest.raises(ValueError, match="noise_std"):
        ExpertRouter(D, 4, 2, "softmax", noise_std=1.0)
    with pytest.raises(ValueError, match="loss_type"):
        LoadBalancingLoss(4, "magic")


# --- in a converted model

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


# --- negative controls: the oracles above can fail


def test_the_oracles_notice_a_wrong_router():
    gate, x = router("topk", 6, 2), states(9)
    expected = {t: oracle_topk(row, 2, **PLAIN) for t, row in enumerate(logits_of(gate, x))}
    same(gate(x), expected)
    same(router("topk", 6, 2, groups=6, top_groups=2)(x), expected)  # groups of one are no limit
    for wrong in ({"normalize": False}, {"temperature": 1.1}, {"route_scale": 1.01}, {"groups": 2, "top_groups": 1}):
        with pytest.raises(AssertionError):
            same(router("topk", 6, 2, **wrong)(x), expected)
