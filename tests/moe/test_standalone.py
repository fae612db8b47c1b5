"""`MoELayer.build` as somebody's own loop uses it: what it learns, computes, refuses and keeps."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import ds_moe
from ds_moe.moe import ExpertRouter, MoELayer
from ds_moe.moe.layer import MANY_FORWARDS
from ds_moe.moe.tape import checkpoint_contexts
from tests.distributed import standalone_ranks
from tests.launcher import run_ranks
from tests.moe.routing import max_vio

D, WIDTH, E, K = 20, 12, 7, 2  # an odd number of experts, nothing square
STEPS, LAST = 200, 40


def build(seed=0, **keys):
    torch.manual_seed(seed)
    return MoELayer.build(**({"dim": D, "width": WIDTH, "experts": E, "top_k": K} | keys))


def trained(**keys):
    """(losses of the first and the last steps, MaxVio before, MaxVio over the last steps): tokens that share a
    direction, which therefore prefer the same experts; the target is a function of the token."""
    layer, generator = build(**keys), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    mixed, shared = torch.randn(D, D, generator=generator) / D**0.5, torch.randn(D, generator=generator)
    losses, loads = [], []
    for step in range(STEPS):
        x = torch.randn(4, 64, D, generator=generator) + shared
        loss = F.mse_loss(layer(x), torch.sin(2 * x @ mixed))
        (loss + layer.aux_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.end_step(step / STEPS)
        losses.append(loss.item())
        loads.append(layer.load.take().counts_E)
    mean = torch.tensor(losses).view(-1, LAST).mean(1)
    return mean[0].item(), mean[-1].item(), max_vio(loads[0]), max_vio(sum(loads[-LAST:]))


@pytest.mark.parametrize("keys", [{"loss_free": 1e-2}, {"loss_free": {"rule": "proportional", "update_rate": 1e-2}}])
def test_200_steps_learn_and_the_bias_balances(keys):
    first, last, before, after = trained(**keys)
    assert last < 0.7 * first and before > 1 and after < 0.2


def test_without_a_bias_the_load_stays_skewed():
    """Negative control of the test above; an aux loss balances too, by gradients."""
    first, last, before, after = trained()
    assert last < 0.7 * first and before > 1 and after > 1
    assert trained(aux=0.1)[3] < 0.2


def test_a_bias_that_is_never_moved_balances_nothing_and_is_noticed():
    layer = build(loss_free=1e-2)
    x = torch.randn(3, D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(MANY_FORWARDS - 1):
            layer(x)
        layer.end_step()
        for _ in range(MANY_FORWARDS - 1):
            layer(x)
    with pytest.warns(UserWarning, match=r"did not move for 256 forwards: call end_step\(\)"):
        layer(x)


# --- what it computes


def dense(layer, x_TD, mask_T=None):
    """Every expert on every token, weighted by a matrix of weights, most of them 0."""
    gate, experts = layer.gate, layer.experts
    logits_TE = x_TD @ gate.weight.T
    scores_TE = logits_TE.sigmoid() if getattr(gate, "scores", "softmax") == "sigmoid" else logits_TE.softmax(-1)
    ranked_TE = scores_TE if gate.balancing is None else scores_TE + gate.balancing.bias_E
    chosen_TE = torch.zeros_like(scores_TE).scatter(1, ranked_TE.topk(gate.top_k).indices, 1.0)
    weight_TE = scores_TE * chosen_TE
    if gate.top_k > 1:
        weight_TE = weight_TE / weight_TE.sum(-1, keepdim=True)
    if mask_T is not None:
        weight_TE = weight_TE * mask_T.unsqueeze(1)
    act = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[experts.activation]
    before = layer.dispatcher.apply_weight == "before"
    total = torch.zeros_like(x_TD)
    for e in range(E):
        weight_T1 = weight_TE[:, e : e + 1]
        gated, up = (experts.gate_up_proj[e] @ (x_TD * weight_T1 if before else x_TD).T).split(WIDTH)
        y_TD = (experts.down_proj[e] @ (act(gated) * up)).T
        total = total + (y_TD if before else y_TD * weight_T1)
    if layer.shared is not None:
        shared = layer.shared
        total = total + (act(x_TD @ shared.gate_proj.weight.T) * (x_TD @ shared.up_proj.weight.T)) @ (
            shared.down_proj.weight.T
        )
    return total


CASES = {
    "plain": {},
    "one expert a token": {"top_k": 1},
    "all experts": {"top_k": E},
    "sigmoid": {"scores": "sigmoid"},
    "a shared expert": {"shared": 9},
    "gelu": {"activation": "gelu", "shared": 9},
    "relu": {"activation": "relu", "backend": "reference"},
    "weights before": {"apply_weight": "before"},
    "a bias": {"loss_free": True},
    "reference": {"backend": "reference"},
    "nothing kept": {"recompute": "all"},
}


@pytest.mark.parametrize("shape", [(3, 11), (17,)], ids=["3D", "2D"])
@pytest.mark.parametrize("keys", CASES.values(), ids=CASES)
def test_value_and_every_gradient_are_those_of_a_loop_over_all_experts(keys, shape):
    layer = build(**keys)
    if layer.gate.balancing is not None:
        layer.gate.balancing.bias_E.copy_(torch.linspace(-0.3, 0.3, E))
    x = torch.randn(*shape, D, requires_grad=True)
    mask = (torch.arange(x[..., 0].numel()) % 5 != 0).view(shape)
    direction = torch.randn(*shape, D)
    y, expected = layer(x, mask), dense(layer, x.reshape(-1, D), mask.flatten()).view_as(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    parameters = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad((one * direction).sum(), parameters) for one in (y, expected))
    for name, mine, other in zip(["x", *dict(layer.named_parameters())], ours, theirs, strict=True):
        assert other.abs().max() > 0, name
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * other.abs().max().item(), msg=name)
    assert layer.load.take().counts_E.sum() == layer.gate.top_k * mask.sum()


def test_a_switched_expert_is_another_value():
    """Negative control of the loop above."""
    layer, x = build(), torch.randn(9, D)
    expected = dense(layer, x)
    with torch.no_grad():
        layer.experts.down_proj.copy_(layer.experts.down_proj.flip(0))
    assert (layer(x) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["topk", "noisy_topk", "expert_choice", "hash", "balanced"])
def test_every_router_trains(kind):
    layer = build(router=kind, z_loss=1e-3) if kind.endswith("topk") else build(router=kind)
    (layer(torch.randn(2, 9, D)).square().sum() + layer.aux_loss()).backward()
    learns = kind not in ("hash", "balanced")
    assert (layer.gate.weight.grad is not None) == layer.gate.weight.requires_grad == learns
    assert layer.experts.down_proj.grad.abs().max() > 0


def test_bf16_and_mixed_precision():
    wide = build(loss_free=True, aux=1e-2, shared=8)
    narrow = build(loss_free=True, aux=1e-2, shared=8).bfloat16()
    x = torch.randn(2, 9, D).bfloat16()
    for layer in (wide, narrow):  # bf16 states in a layer of fp32 weights, and of bf16 weights
        y = layer(x)
        (y.float().square().mean() + layer.aux_loss()).backward()
        assert y.dtype == torch.bfloat16 and layer.experts.down_proj.grad.isfinite().all()
    assert narrow.gate.balancing.bias_E.dtype == torch.float32
    torch.testing.assert_close(narrow(x).float(), wide(x).float(), rtol=0.1, atol=0.1)
    for layer in (wide, narrow):
        layer.aux_loss()
    with torch.autocast("cpu", torch.bfloat16):
        (wide(torch.randn(2, 9, D)).square().mean() + wide.aux_loss()).backward()
    with pytest.raises(TypeError, match="float32, wider than the layer's torch.bfloat16"):
        narrow(x.float())


# --- losses are taken once, and nothing is kept


def test_aux_losses_are_the_weighted_terms_and_are_taken_once():
    layer = build(aux={"weight": 0.5, "normalize_by_k": True}, z_loss=0.1)
    x = torch.randn(2, 9, D)
    layer(x)
    taken, logits_TE = layer.aux_loss(), x.view(-1, D) @ layer.gate.weight.T
    top_VK = logits_TE.topk(K).indices
    f_E = torch.bincount(top_VK.flatten(), minlength=E) / (18 * K)
    expected = 0.5 * E * (f_E * logits_TE.softmax(-1).mean(0)).sum() + 0.1 * logits_TE.logsumexp(-1).square().mean()
    torch.testing.assert_close(taken, expected)
    torch.testing.assert_close(*(torch.autograd.grad(one, layer.gate.weight)[0] for one in (taken, expected)))
    assert layer.aux_loss() == 0 and build().aux_loss() == 0


def test_flat_tokens_are_one_sequence():
    layer, x = build(aux={"scope": "sequence", "weight": 1.0}), torch.randn(9, D)
    losses = []
    for shaped in (x, x.unsqueeze(0), x.unsqueeze(1)):
        layer(shaped)
        losses.append(layer.aux_loss())
    assert losses[0] == losses[1] != losses[2]


def test_losses_that_nobody_takes_stop_the_loop():
    layer, x = build(aux=1e-2), torch.randn(2, 9, D)
    layer(x)
    for forgotten in (lambda: layer(x), layer.end_step):
        with pytest.raises(RuntimeError, match=r"were not taken: add layer.aux_loss\(\) to the loss"):
            forgotten()
    layer.eval()(x)  # an evaluation in between neither raises nor drops them
    assert layer.aux_loss() > 0
    layer.train()(x)


def test_a_forgetful_loop_without_balancers_keeps_nothing():
    layer, x = build(), torch.randn(2, 9, D)
    for _ in range(3):
        layer(x)
    assert layer.context.aux_losses == [] and layer.load.take().tokens == 3 * 18  # sums of one size


def test_evaluation_collects_nothing():
    layer = build(aux=1e-2, z_loss=1e-3, loss_free=1e-2, expert_dropout=0.3).eval()
    x = torch.randn(2, 9, D)
    assert torch.equal(layer(x), layer(x))
    assert layer.aux_loss() == 0 and layer.load.take() is None
    layer.end_step()
    assert layer.gate.balancing.bias_E.abs().max() == 0


def test_accumulated_micro_batches_move_the_bias_once_and_as_one_batch():
    one, two = (build(loss_free={"rule": "proportional", "update_rate": 0.1}) for _ in range(2))
    x = torch.randn(4, 9, D)
    one(x)
    for half in x.chunk(2):
        two(half)
        assert two.gate.balancing.bias_E.abs().max() == 0
    for layer in (one, two):
        layer.end_step()
    assert one.gate.balancing.bias_E.abs().max() > 0
    assert torch.equal(one.gate.balancing.bias_E, two.gate.balancing.bias_E)
    moved = one.gate.balancing.bias_E.clone()
    one.end_step()  # nothing was counted since
    assert torch.equal(one.gate.balancing.bias_E, moved)
    with pytest.raises(ValueError, match="progress=7 must lie between 0 and 1"):
        one.end_step(7)


def test_a_state_dict_brings_everything_back():
    layer = build(loss_free=1e-2, shared=5, router="noisy_topk", noise_std=0.5)
    for _ in range(3):
        layer(torch.randn(2, 9, D) + 1)
        layer.end_step()
    saved, other = layer.state_dict(), build(1, loss_free=1e-2, shared=5, router="noisy_topk", noise_std=0.5)
    assert {"gate.weight", "gate.balancing.bias_E", "experts.gate_up_proj", "shared.down_proj.weight"} < set(saved)
    assert saved["gate.balancing.bias_E"].abs().max() > 0
    x = torch.randn(2, 9, D)
    assert not torch.equal(other.eval()(x), layer.eval()(x))
    other.load_state_dict(saved)
    assert torch.equal(other(x), layer(x)) and torch.equal(other.gate.balancing.bias_E, saved["gate.balancing.bias_E"])


def test_gradient_checkpointing_counts_once_or_is_refused():
    plain, other = build(aux=1e-2, loss_free=True), build(aux=1e-2, loss_free=True)
    behind = [build(2, aux=1e-2), build(2, aux=1e-2)]
    x = torch.randn(2, 9, D, requires_grad=True)

    def losses(first, second, y):
        return y.square().mean() + first.aux_loss() + second.aux_loss()

    def region(x):
        return behind[1](other(x))  # two layers on one tape

    losses(plain, behind[0], behind[0](plain(x))).backward()
    expected, x.grad = x.grad, None
    y = checkpoint(region, x, use_reentrant=False, context_fn=checkpoint_contexts)
    losses(other, behind[1], y).backward()
    assert torch.equal(x.grad, expected) and torch.equal(plain.gate.weight.grad, other.gate.weight.grad)
    assert torch.equal(plain.load.take().counts_E, other.load.take().counts_E)
    with pytest.raises(RuntimeError, match="context_fn=ds_moe.moe.tape.checkpoint_contexts"):
        losses(other, behind[1], checkpoint(region, x, use_reentrant=False)).backward()
    with pytest.raises(RuntimeError, match="once in a checkpointed region"):
        lone = build()
        checkpoint(lambda x: lone(lone(x)), x, use_reentrant=False, context_fn=checkpoint_contexts)


# --- what is refused

REFUSED = {
    "a float": ({"dim": 20.0}, TypeError, r"dim=20.0 must be a whole number"),
    "true": ({"experts": True}, TypeError, "experts=True must be a whole number"),
    "text": ({"top_k": "2"}, TypeError, "top_k='2' must be a whole number"),
    "nothing": ({"width": 0}, ValueError, "width=0 must be at least 1"),
    "too many": ({"top_k": 8}, ValueError, "top_k=8 must lie between 1 and the number of experts, 7"),
    "a router": ({"router": "top_k"}, ValueError, "router='top_k' must be one of topk, noisy_topk, expert_choice"),
    "a router's type": ({"router": None}, TypeError, "router=None must be text: one of topk"),
    "a setting": ({"nois_std": 1.0}, TypeError, "router topk has no setting 'nois_std'; it has expert_dropout"),
    "another kind's": ({"noise_std": 1.0}, TypeError, "router topk has no setting 'noise_std'"),
    "the kind twice": ({"kind": "topk"}, TypeError, "router topk has no setting 'kind'"),
    "a flag of run files": (
        {"router": "expert_choice", "allow_noncausal": True},
        TypeError,
        "router expert_choice has no setting 'allow_noncausal'; it has expert_dropout",
    ),
    "a setting's type": ({"temperature": "hot"}, TypeError, "router topk: temperature='hot' must be a valid number"),
    "a setting's range": ({"temperature": 0.0}, ValueError, "temperature=0.0 must be greater than 0"),
    "a setting's choice": ({"scores": "tanh"}, ValueError, "scores='tanh' must be 'softmax' or 'sigmoid'"),
    "groups": ({"groups": 2, "top_groups": 1}, ValueError, "cannot give"),
    "a negative weight": ({"aux": -1.0}, ValueError, "aux: weight=-1.0 must be greater than 0"),
    "a weight's type": ({"z_loss": "1e-3"}, TypeError, "z_loss: weight='1e-3' must be a valid number"),
    "a weight's key": ({"aux": {"wieght": 1.0}}, TypeError, "aux has no setting 'wieght'; it has weight, scope"),
    "a rule": ({"loss_free": {"rule": "signs"}}, ValueError, "loss_free: rule='signs' must be 'sign' or"),
    "a rate": ({"loss_free": float("nan")}, ValueError, "loss_free: update_rate=nan"),
    "no use": ({"router": "hash", "aux": 0.1}, ValueError, "aux would not be used: router hash learns nothing"),
    "no use either": (
        {"router": "expert_choice", "loss_free": True},
        ValueError,
        "loss_free would not be used: router expert_choice gives all experts the same load",
    ),
    "an activation": ({"activation": "swish"}, ValueError, "activation='swish' must be one of silu, gelu, relu"),
    "a backend": ({"backend": "triton"}, ValueError, "backend='triton' must be one of auto, grouped_mm"),
    "liger's": ({"backend": "liger", "activation": "relu"}, ValueError, "computes activation='silu' only"),
    "recompute": ({"recompute": "some"}, ValueError, "recompute='some' must be one of none, act, all"),
    "unused recompute": ({"recompute": "all", "activation": "gelu"}, ValueError, "not be used with activation='gelu'"),
    "unused there": ({"recompute": "all", "backend": "reference"}, ValueError, "not be used with backend='reference'"),
    "weights where": ({"apply_weight": "between"}, ValueError, "apply_weight='between' must be one of before, after"),
    "a shared expert": ({"shared": 1.5}, TypeError, "shared=1.5 must be a whole number"),
}


@pytest.mark.parametrize(("keys", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_are_refused(keys, error, message):
    with pytest.raises(error, match=message) as found:
        build(**keys)
    assert "\n" not in str(found.value)


def test_zero_and_none_switch_balances_off():
    for off in (0, 0.0, None, False):
        layer = build(aux=off, z_loss=off, loss_free=off)
        assert layer.balancers == [] and layer.gate.balancing is None
    assert build(loss_free={}).gate.balancing.update_rate == build(loss_free=True).gate.balancing.update_rate == 1e-3


STATES = {
    "ids": (torch.zeros(2, 3, D).long(), None, TypeError, "torch.int64, not floats"),
    "a list": ([[0.0] * D], None, TypeError, "must be tensors"),
    "a mask's type": (torch.zeros(2, 3, D), [[1, 1, 1], [1, 1, 0]], TypeError, "must be tensors"),
    "a width": (torch.zeros(2, 3, D + 1), None, ValueError, rf"\(2, 3, {D + 1}\) must be \(B, S, {D}\) or"),
    "one token": (torch.zeros(D), None, ValueError, "must be"),
    "four dimensions": (torch.zeros(1, 2, 3, D), None, ValueError, "must be"),
    "a mask": (torch.zeros(2, 3, D), torch.ones(2, 4), ValueError, r"mask \(2, 4\) must be \(2, 3\)"),
    "float64": (torch.zeros(2, 3, D).double(), None, TypeError, "wider than the layer's torch.float32"),
}


@pytest.mark.parametrize(("x", "mask", "error", "message"), STATES.values(), ids=STATES)
def test_hidden_states_that_are_refused(x, mask, error, message):
    with pytest.raises(error, match=message):
        build()(x, mask)


# --- where people find it


def test_no_deepspeed_is_imported_and_help_points_there():
    code = (
        "import sys, torch; from ds_moe.moe import MoELayer\n"
        "layer = MoELayer.build(dim=12, width=20, experts=3, top_k=2, aux=1e-2, loss_free=1e-3)\n"
        "(layer(torch.randn(5, 12)).sum() + layer.aux_loss()).backward(); layer.end_step()\n"
        "print([name for name in ('deepspeed', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert "help(MoELayer.build)" in ds_moe.__doc__ and "loss_free" in MoELayer.build.__doc__


@pytest.mark.slow
def test_under_ddp_the_bias_counts_all_ranks():
    """Two ranks of two micro-batches against one process with everything; DDP's broadcast of buffers breaks it."""
    ranks = run_ranks("tests/distributed/standalone_ranks.py", 2).json_by_rank
    layer = standalone_ranks.built()
    x = torch.randn(2, 2, 9, D, generator=torch.Generator().manual_seed(1))
    layer(x.view(-1, D)).square().sum().backward()
    layer.end_step()
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank["bias_False"]), layer.gate.balancing.bias_E)
        torch.testing.assert_close(torch.tensor(rank["grad_False"]), layer.gate.weight.grad.flatten() / 2)
    assert any(rank["bias_True"] != rank["bias_False"] for rank in ranks)


@pytest.mark.parametrize("shape", [(0, D), (0, 5, D), (3, 0, D)])
@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_no_tokens_give_no_output_and_no_loss(shape, scope):
    layer, router = build(aux={"scope": scope}, z_loss=True, loss_free=True), ExpertRouter(D, E, K)
    y, loss = layer(torch.empty(shape)), layer.aux_loss()
    (y.sum() + loss).backward()
    assert y.shape == shape and loss == 0
    assert all(not parameter.grad.any() for parameter in layer.parameters())
    weights, indices, loss = router(torch.empty(shape))
    assert weights.shape == indices.shape == (*shape[:-1], K) and loss == 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_second_derivatives_are_refused_and_not_wrong(backend):
    """torch's once_differentiable says nothing where the gradient that comes in is a constant, as that of a sum is."""
    layer, x = build(backend=backend), torch.randn(4, D, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    layer.aux_loss()
    assert torch.autograd.grad(layer(x).sum(), x)[0].any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_of_a_layer_are_layers_of_their_own_in_a_checkpointed_region(copied):
    first = build(aux=1e-2)
    layers = [first, copied(first), copied(first)]
    x = torch.randn(5, D, requires_grad=True)

    def stacked(x):
        for layer in layers:
            x = layer(x)
        return x

    plain = torch.autograd.grad(stacked(x).square().sum(), x)[0]
    for layer in layers:
        layer.aux_loss()
    y = checkpoint(stacked, x, use_reentrant=False, context_fn=checkpoint_contexts)
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], plain)
