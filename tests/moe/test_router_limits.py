"""What a router leaves out: assignments beyond an expert's capacity, and experts that are dropped out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_moe.moe.routers.limits import survives_dropout
from tests.moe.routing import quick, router, same, some_tokens, states, table


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
