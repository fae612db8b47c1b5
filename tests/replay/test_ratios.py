"""Log-probabilities, ratios, corrections and KL estimates against loops, closed forms and hostile numbers."""

import math

import pytest
import torch

from ds_moe.config.tasks import CORRECTION_BOUNDS
from ds_moe.replay.ratios import (
    LOG_RATIO_LIMIT,
    engine_weight,
    expert_logprobs,
    joint_logprob,
    kl_estimate,
    log_ratio,
    router_shift,
    sequence_mean,
)

INF, NAN = math.inf, math.nan
B, S, V, L, K, E = 3, 6, 11, 4, 2, 8


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def mask_of(*lengths):
    """Completions that end with the sequence, of these lengths."""
    return torch.stack([torch.arange(S) >= S - length for length in lengths])


# --- log-probabilities


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.uint16])
def test_expert_logprobs_of_a_loop(dtype):
    logits_TE = torch.randn(5, E)
    ids_TK = torch.stack([torch.randperm(E)[:K] for _ in range(5)])
    found_TK, replayed_TK = expert_logprobs(logits_TE.bfloat16(), ids_TK.to(dtype))
    assert found_TK.dtype == torch.float32 and bool(replayed_TK.all())
    for t in range(5):
        weights = [math.exp(x) for x in logits_TE[t].bfloat16().tolist()]
        for k in range(K):
            assert found_TK[t, k].item() == pytest.approx(math.log(weights[ids_TK[t, k]] / sum(weights)), abs=1e-5)


def test_an_expert_that_is_not_replayed_gives_zero_and_passes_nothing_on():
    logits_TE = torch.randn(3, E)
    logits_TE[1] = NAN
    logits_TE.requires_grad_()
    found_TK, replayed_TK = expert_logprobs(logits_TE, torch.tensor([[0, 3], [-1, -1], [5, -1]]))
    assert replayed_TK.tolist() == [[True, True], [False, False], [True, False]]
    assert found_TK[1].tolist() == [0, 0] and found_TK[2, 1] == 0
    (grad_TE,) = torch.autograd.grad(found_TK.sum(), logits_TE)
    assert bool(grad_TE.isfinite().all()) and grad_TE[1].abs().sum() == 0 and grad_TE[2].abs().sum() > 0


# --- ratios


def test_log_ratio_survives_infinities_and_what_stands_under_a_false_mask():
    new = torch.tensor([[-1.0, -1.0, -1e30, NAN, -2.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-INF, -900.0, -1.0, -1.0, NAN, -1.5]])
    mask = torch.tensor([[True, True, True, False, False, True]])
    found = log_ratio(new, old, mask)
    assert found.tolist() == [[LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT, 0, 0, 0.5]]
    (grad,) = torch.autograd.grad(found.exp().sum(), new)
    assert grad[0, :5].tolist() == [0, 0, 0, 0, 0] and grad[0, 5] == pytest.approx(math.exp(0.5))
    naive = ((new - old) * mask).exp().sum()  # negative control: masks as factors
    assert naive.isnan() and bool(torch.autograd.grad(naive, new)[0].isnan().any())


def test_a_nan_at_a_completion_token_is_not_hidden():
    assert log_ratio(torch.tensor([[NAN]]), torch.tensor([[-1.0]]), torch.tensor([[True]])).isnan()


def test_sequence_mean_of_ragged_rows():
    values_BS, mask_BS = torch.randn(B, S).double(), mask_of(4, 0, 1)
    expected = [values_BS[0, 2:].mean().item(), 0.0, values_BS[2, 5].item()]
    assert sequence_mean(values_BS, mask_BS).tolist() == pytest.approx(expected)


def test_router_shift_of_a_loop():
    live, old = torch.randn(B, S, L, K, requires_grad=True), torch.randn(B, S, L, K)
    routed_BS = torch.rand(B, S) < 0.7
    poisoned = torch.where(routed_BS[..., None, None], live, NAN)
    for floor in (0.0, 0.4):
        gamma_BS = router_shift(poisoned, old, routed_BS, floor)
        assert not gamma_BS.requires_grad
        for b in range(B):
            for t in range(S):
                deltas = (live[b, t] - old[b, t]).flatten().tolist()
                expected = max(math.exp(-sum(map(abs, deltas)) / (L * K)), floor) if routed_BS[b, t] else 1.0
                assert gamma_BS[b, t].item() == pytest.approx(expected, abs=1e-6)


def test_the_router_part_is_averaged_over_layers_and_top_k():
    """Numbers of FACTS 5: a jitter of 0.02 in the logits at 48 layers x 8 experts."""
    tokens, layers, top_k = 64, 48, 8
    logits = torch.randn(tokens * layers, 128)
    ids = logits.topk(top_k).indices
    old, live = (
        expert_logprobs(x, ids)[0].view(1, tokens, layers, top_k)
        for x in (logits, logits + 0.02 * torch.randn(logits.shape))
    )
    routed = torch.ones(1, tokens, dtype=torch.bool)
    zero = torch.zeros(1, tokens)
    joint = joint_logprob(zero, live, routed, 1.0) - joint_logprob(zero, old, routed, 1.0)
    assert 5e-4 < joint.std() < 1.5e-3
    assert (live - old).sum((-2, -1)).std() > 0.2  # negative control: summed, noise alone would pass any clip
    gamma = router_shift(live, old, routed, 0.0)
    assert gamma.min() > 0.97 and (-(live - old).abs().sum((-2, -1))).exp().max() < 0.01


# --- engine mismatch


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["none", "tis", "mis", "icepop"])
@pytest.mark.parametrize("bounds", [(None, None), (0.8, 1.3)])
def test_engine_weight_of_a_loop(kind, level, bounds):
    engine, old, mask = -torch.rand(40, S).double(), -torch.rand(40, S).double(), torch.rand(40, S) < 0.6
    found = engine_weight(old, engine, mask, kind, *bounds, level)
    if kind != "none":
        low, high = (
            given if given is not None else usual for given, usual in zip(bounds, CORRECTION_BOUNDS[kind], strict=True)
        )
    for b in range(40):
        logs = {t: (old[b, t] - engine[b, t]).item() for t in range(S) if mask[b, t]}
        for t, log in logs.items():
            w = math.exp(sum(logs.values()) if level == "sequence" else log)
            if kind == "none":
                expected = 1.0
            elif kind == "tis":
                expected = min(max(w, low), high)
            else:
                expected = w if low <= w <= high else 0.0
            assert found[b, t].item() == pytest.approx(expected)


def test_engine_weight_of_hostile_numbers():
    old, engine = torch.tensor([[-INF, -1.0, NAN, -1.0]]), torch.tensor([[-1.0, -INF, -1.0, NAN]])
    mask = torch.tensor([[True, True, False, False]])
    for kind, expected in (
        ("tis", [math.exp(-LOG_RATIO_LIMIT), 2.0]),
        ("mis", [math.exp(-LOG_RATIO_LIMIT), 0.0]),
        ("icepop", [0, 0]),
    ):
        for level in ("token", "sequence"):
            found = engine_weight(old, engine, mask, kind, level=level)
            assert bool(found.isfinite().all())
            if level == "token":
                assert found[0, :2].tolist() == pytest.approx(expected)


# --- KL


def test_kl_estimates_of_a_loop():
    policy, reference, mask = -torch.rand(B, S).double(), -torch.rand(B, S).double(), mask_of(4, 0, 2)
    for kind, formula in (("k1", lambda d: -d), ("k2", lambda d: d * d / 2), ("k3", lambda d: math.exp(d) - 1 - d)):
        found = kl_estimate(policy, reference, mask, kind)
        for b in range(B):
            for t in range(S):
                expected = formula((reference[b, t] - policy[b, t]).item()) if mask[b, t] else 0.0
                assert found[b, t].item() == pytest.approx(expected)


def test_expectations_of_kl_estimates_over_a_categorical():
    """k1 and k3 average to KL(policy || reference), k2's gradient to its gradient, and k1's to nothing."""
    logits, reference = (
        torch.randn(1, 7, dtype=torch.float64, requires_grad=True),
        torch.randn(1, 7).double().log_softmax(-1),
    )
    policy, every = logits.log_softmax(-1), torch.ones(1, 7, dtype=torch.bool)
    sampled = policy.detach().exp()  # of each outcome, a constant as in a batch of samples
    kl = (policy.exp() * (policy - reference)).sum()
    (kl_grad,) = torch.autograd.grad(kl, logits, retain_graph=True)
    means = {kind: (sampled * kl_estimate(policy, reference, every, kind)).sum() for kind in ("k1", "k2", "k3")}
    torch.testing.assert_close(means["k1"], kl)
    torch.testing.assert_close(means["k3"], kl)
    torch.testing.assert_close(torch.autograd.grad(means["k2"], logits, retain_graph=True)[0], kl_grad)
    torch.testing.assert_close(torch.autograd.grad(means["k1"], logits)[0], torch.zeros_like(kl_grad))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_of_hostile_numbers_is_finite(kind):
    policy = torch.tensor([[-1.0, -1e4, NAN, -1.0]], requires_grad=True)
    reference, mask = torch.tensor([[-INF, -1.0, -1.0, NAN]]), torch.tensor([[True, True, False, False]])
    found = kl_estimate(policy, reference, mask, kind)
    (grad,) = torch.autograd.grad(found.sum(), policy)
    assert bool(found.isfinite().all()) and bool(grad.isfinite().all()) and found[0, 2:].tolist() == [0, 0]


def test_kl_of_equal_policies_is_zero():
    policy, mask = -torch.rand(B, S), mask_of(3, 2, 1)
    for kind in ("k1", "k2", "k3"):
        assert kl_estimate(policy, policy, mask, kind).abs().sum() == 0
