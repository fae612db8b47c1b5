"""Routers to test, and what they must decide: float64 in NumPy, one token at a time, as the papers write it."""

import numpy as np
import pytest
import torch
from hypothesis import settings

from ds_moe.moe.parts import make_router

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


def some_tokens(tokens, seed, share):
    """Indices of the real tokens, none of them to all; None where all are, half of the time."""
    real = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < share
    return None if bool(real.all()) and seed % 2 else real.nonzero().squeeze(1)


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


def max_vio(counts_E):
    return (counts_E.max() / counts_E.float().mean() - 1).item()
