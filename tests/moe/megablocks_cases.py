"""Runs megablocks' real Triton kernels in the interpreter and reports how far they are from torch and float64.

python -m tests.moe.megablocks_cases [slow]
"""

import contextlib
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ds_moe.config.moe import ExpertsConfig, MoEConfig
from ds_moe.models.convert import convert
from ds_moe.models.presets import build_preset
from ds_moe.moe.backends.base import Backend
from ds_moe.moe.backends.megablocks import Megablocks
from ds_moe.moe.backends.megablocks_ops import active, load_megablocks
from ds_moe.moe.context import ForwardContext
from ds_moe.moe.decision import RoutingDecision
from ds_moe.moe.dispatch import LocalDispatcher
from ds_moe.moe.experts import Experts
from ds_moe.moe.layer import MoELayer
from ds_moe.moe.parts import make_router
from tests.launcher import report

E = 6
HALF_A_PLACE = {torch.float32: 2**-22, torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float64: 1e-14}


class Listed(NamedTuple):
    """A list of assignments."""

    tokens: int
    token_N: list[int]
    expert_N: list[int]
    top_k: int | None = None
    width: int = 24
    kernels: int = 2  # how many of the two movements it must run, of those with values


def uniform(tokens, top_k, seed=0, **settings):
    """Experts 1 and 4 get nothing, if that is possible."""
    generator = torch.Generator().manual_seed(seed)
    order_TE = torch.rand(tokens, E, generator=generator)
    order_TE[:, [1, 4]] -= 1
    expert_N = order_TE.topk(top_k).indices.flatten().tolist()
    return Listed(tokens, [t for t in range(tokens) for _ in range(top_k)], expert_N, top_k, **settings)


LISTS = {
    "two of six, two experts without rows": uniform(7, 2),
    "all of six": uniform(3, E),
    "one of six": uniform(5, 1),
    "one token": uniform(1, 3),
    "columns of two blocks": uniform(4, 2, width=100),
    "columns of an odd number": uniform(4, 3, width=7),
    "one column": uniform(4, 2, width=1),
    "all to one expert": Listed(4, [0, 1, 2, 3], [3, 3, 3, 3], 1),
    "tokens with none, one, three": Listed(5, [4, 0, 4, 2, 4, 0], [0, 5, 5, 2, 3, 0], kernels=1),
    "one row of many tokens": Listed(9, [5], [2], kernels=1),
    "every other expert choice": Listed(3, [0, 2, 0, 2, 1, 2, 0], [1, 1, 3, 3, 3, 5, 5], kernels=1),
    "no rows": Listed(4, [], [], kernels=0),
    "no tokens": Listed(0, [], [], top_k=2, kernels=0),
}


FEW = ("tokens with none, one, three", "two of six, two experts without rows", "columns of two blocks")


def decision(listed):
    logits_TE = torch.zeros(listed.tokens, E)
    token_N, expert_N = (torch.tensor(values, dtype=torch.int64) for values in (listed.token_N, listed.expert_N))
    weight_N = torch.ones(len(listed.token_N))
    return RoutingDecision(logits_TE, logits_TE, token_N, expert_N, weight_N, top_k=listed.top_k)


@contextlib.contextmanager
def launches():
    """A list that fills with the kernels that are launched."""
    kernel = load_megablocks("cpu").backend.kernels._padded_copy
    original, seen = kernel.run, []
    kernel.run = lambda *args, **kwargs: seen.append(kwargs["A_TO_B"]) or original(*args, **kwargs)
    try:
        yield seen
    finally:
        del kernel.run


def excess(sums_TD, rows_ND, order, tokens):
    """How much further from the float64 sums than one rounding and some units of fp32 arithmetic; right: at most 0."""
    exact_TD = torch.zeros(tokens, rows_ND.shape[1], dtype=torch.float64)
    exact_TD.index_add_(0, order.token_N, rows_ND.double())
    scale_TD = torch.zeros_like(exact_TD).index_add_(0, order.token_N, rows_ND.double().abs())
    fp32 = 2**-22 if sums_TD.dtype != torch.float64 else 1e-14
    allowed_TD = HALF_A_PLACE[sums_TD.dtype] * exact_TD.abs() + fp32 * scale_TD
    return ((sums_TD.double() - exact_TD).abs() - allowed_TD).max().item() if tokens else 0.0


def movements(listed, dtype, wrong=lambda order: order):
    """Ours against torch's, each from its own sort; `wrong` breaks the order first."""
    given = decision(listed)
    order = LocalDispatcher("megablocks").plan(given).permutation
    theirs = LocalDispatcher("grouped_mm").plan(given).permutation
    same = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(order[:-1], theirs[:-1], strict=True))
    order = wrong(order)
    torch.manual_seed(0)
    x_TD = torch.randn(listed.tokens, listed.width).to(dtype)
    x_TD = x_TD.T.contiguous().T  # not contiguous
    rows_ND = torch.randn(len(listed.token_N), listed.width).to(dtype)
    if len(rows_ND) > 1:  # sums that cancel
        token_N = theirs.token_N.tolist()
        for first, second in ((i, j) for j, token in enumerate(token_N) for i in range(j) if token_N[i] == token):
            rows_ND[second] = -rows_ND[first] * 1.01
            break
    with launches() as seen:
        moved_ND = Megablocks().to_experts(x_TD, order)
        sums_TD = Megablocks().sum_per_token(rows_ND.T.contiguous().T, order)
    assert sums_TD.dtype == dtype and sums_TD.shape == x_TD.shape and moved_ND.dtype == dtype
    return {
        "sorted as torch does": same,
        "to experts as torch does": torch.equal(moved_ND, Backend().to_experts(x_TD, theirs)),
        "excess": excess(sums_TD, rows_ND, theirs, listed.tokens),
        "launched": seen,
        "wanted": [True, False][: listed.kernels],
    }


def swapped_indices(order):
    """Two rows of different tokens change places."""
    other = next(i for i, token in enumerate(order.token_N) if token != order.token_N[0])
    swap = torch.arange(order.token_N.numel())
    swap[0], swap[other] = other, 0
    return order._replace(order_N=order.order_N[swap], token_N=order.token_N[swap])


def shifted(order):
    return order._replace(order_N=order.order_N.roll(1), token_N=order.token_N.roll(1))


def sorts():
    """Experts that fill one, two and no byte, against a stable sort."""
    results = {}
    for experts in (1, 2, 6, 256, 257, 1000):
        expert_N = torch.randint(0, experts, (300,), generator=torch.Generator().manual_seed(experts))
        order_N, counts_E = Megablocks().sort(expert_N, experts)
        expected = torch.argsort(expert_N, stable=True), torch.bincount(expert_N, minlength=experts)
        results[str(experts)] = torch.equal(order_N, expected[0]) and torch.equal(counts_E, expected[1])
    return results


def difference(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)).item()


def model(backend):
    """Loss and gradients of a small Qwen3-MoE with padding, converted with one backend."""
    model = build_preset("tiny-moe")
    del model.model.layers[1:]  # each costs the interpreter a second
    convert(model, MoEConfig(experts=ExpertsConfig(backend=backend)))
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(8, 40, (2, 6), generator=generator)
    mask = torch.ones_like(input_ids)
    results = []
    for padding in (0, 4):  # the second forward's list has no fixed top_k
        mask[1, 6 - padding :] = 0
        model.zero_grad()
        loss = model(input_ids, attention_mask=mask, labels=input_ids.where(mask.bool(), -100)).loss
        loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        results.append({"loss": loss.detach(), **gradients})
    return results


def whole_model():
    with launches() as seen:
        ours = model("megablocks")
    pairs = zip(ours, model("reference"), strict=True)
    worst = [max((difference(a[name], b[name]), name) for name in b) for a, b in pairs]
    return {"worst": worst, "launches": len(seen)}


def dmoe(tokens, top_k, D=24, FFN=40, wrong=False):
    """megablocks' own dropless layer against ours with the same weights: output and gradients."""
    megablocks = load_megablocks("cpu")
    torch.manual_seed(top_k)
    arguments = megablocks.Arguments(
        **{"hidden_size": D, "ffn_hidden_size": FFN, "moe_num_experts": E, "moe_top_k": top_k, "bias": False},
        **{"return_bias": False, "activation_fn": F.silu, "mlp_type": "glu", "mlp_impl": "grouped"},
        **{"moe_normalize_expert_weights": 1, "moe_loss_weight": 0, "fp16": False, "device": torch.device("cpu")},
    )
    theirs = megablocks.dMoE(arguments)
    glu, router = theirs.experts.mlp, theirs.router.layer.weight
    for weight in (glu.w1, glu.v1, glu.w2, router):
        torch.nn.init.normal_(weight, std=0.3)

    def stacked(w1, v1, w2):
        gate, up, down = (weight.view(E, FFN, D) for weight in (w1, v1, w2))
        return torch.cat([gate, up], dim=1), down.transpose(1, 2)

    parameters = [torch.nn.Parameter(weight.detach().clone()) for weight in stacked(glu.w1, glu.v1, glu.w2)]
    if wrong:
        parameters[1].data[[0, 2]] = parameters[1].data[[2, 0]]
    gate = make_router("topk", torch.nn.Parameter(router.detach().clone()), top_k, normalize=True)
    ours = MoELayer(gate, Experts(*parameters, "megablocks"), LocalDispatcher("megablocks"), ForwardContext(), 0)
    x_TD, direction_TD = torch.randn(tokens, D), torch.randn(tokens, D)
    outputs = []
    for layer, weights in ((ours, [gate.weight, *parameters]), (theirs, [router, glu.w1, glu.v1, glu.w2])):
        x = x_TD.view(1, tokens, D).clone().requires_grad_()
        y = layer(x)
        outputs.append((y, *torch.autograd.grad(y, [x, *weights], direction_TD.view_as(y))))
    y, x_grad, router_grad, *grads = outputs[1]
    expected = y, x_grad, router_grad, *stacked(*grads)
    return max(difference(a, b) for a, b in zip(outputs[0], expected, strict=True))


def main():
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if sys.argv[1:] == ["slow"]:
        report(lists={f"{name}, {dtype}": movements(one, dtype) for dtype in dtypes for name, one in LISTS.items()})
        return
    report(active=active())
    few = {f"{name}, {dtype}": movements(LISTS[name], dtype) for name, dtype in zip(FEW, dtypes, strict=True)}
    report(lists=few, sorts=sorts())
    report(float64=movements(LISTS["all of six"], torch.float64))
    broken = LISTS["tokens with none, one, three"], LISTS["two of six, two experts without rows"]
    report(
        broken=[movements(listed, torch.float32, wrong) for listed in broken for wrong in (swapped_indices, shifted)]
    )
    report(dmoe={f"{tokens} tokens, k {k}": dmoe(tokens, k) for tokens, k in ((9, 2), (1, 1), (3, E))})
    report(dmoe_wrong=dmoe(9, 2, wrong=True))
    report(model=whole_model())


if __name__ == "__main__":
    main()
