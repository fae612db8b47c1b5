"""The layer in one process, against slow references: forward and backward, with empty experts, padding, recompute."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ds_moe.moe.balance import AuxLoss
from ds_moe.moe.context import ForwardContext
from ds_moe.moe.dispatch import LocalDispatcher
from ds_moe.moe.experts import Experts
from ds_moe.moe.layer import MoELayer
from ds_moe.moe.parts import make_router
from ds_moe.moe.tape import checkpoint_contexts
from tests.devices import by_device

D, F, E = 24, 20, 6  # never square: D != F, D != 2F


def make_layer(top_k=2, backend="grouped_mm", balancers=(), seed=0, normalize=True):
    generator = torch.Generator().manual_seed(seed)

    def parameter(*shape):
        return torch.nn.Parameter(torch.randn(*shape, generator=generator) * 0.3)

    return MoELayer(
        gate=make_router("topk", parameter(E, D), top_k, normalize=normalize),
        experts=Experts(parameter(E, 2 * F, D), parameter(E, D, F), backend),
        dispatcher=LocalDispatcher(),
        context=ForwardContext(),
        index=0,
        balancers=list(balancers),
    )


def slow(layer, x_TD, token_V=None):
    """Token by token, expert by expert, as the papers write it."""
    rows = []
    for t, x in enumerate(x_TD):
        if token_V is not None and t not in token_V:
            rows.append(torch.zeros(D, dtype=x.dtype))
            continue
        scores = torch.softmax(layer.gate.weight @ x, 0)
        top = scores.topk(layer.gate.top_k)
        weights = top.values / top.values.sum() if layer.gate.normalize else top.values
        y = torch.zeros_like(x)
        for weight, expert in zip(weights, top.indices, strict=True):
            gate, up = (layer.experts.gate_up_proj[expert] @ x).split(F)
            y = y + weight * (layer.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


def gradients(layer, output, direction, x):
    parameters = [x, *layer.parameters()]
    return torch.autograd.grad((output * direction).sum(), parameters)


@by_device
@pytest.mark.parametrize("backend", ["grouped_mm", "reference"])
@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_the_slow_reference_forward_and_backward(backend, top_k, tokens, normalize, device):
    layer = make_layer(top_k, backend, normalize=normalize).to(device)
    x = torch.randn(1, tokens, D, device=device, requires_grad=True)
    direction = torch.randn(1, tokens, D, device=device)
    y, expected = layer(x), slow(layer, x[0]).unsqueeze(0)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)  # fp32, sums of at most 24 terms in another order
    ours, theirs = gradients(layer, y, direction, x), gradients(layer, expected, direction, x)
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-4, atol=1e-5)


def test_float64_reference_agrees_to_rounding():
    layer = make_layer(backend="reference").double()
    x = torch.randn(1, 9, D, dtype=torch.float64, requires_grad=True)
    # fp32 is what routing maths is done in, so float64 hidden states agree to fp32 rounding of the weights only.
    torch.testing.assert_close(layer(x)[0], slow(layer, x[0]), rtol=1e-6, atol=1e-6)


def test_an_expert_without_rows_gets_a_zero_gradient():
    layer = make_layer(top_k=1)
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[2] = 1.0
    x = torch.rand(2, 5, D) + 0.1  # every token prefers expert 2
    layer(x).square().sum().backward()
    used = layer.experts.gate_up_proj.grad.abs().sum((1, 2)) > 0
    assert used.tolist() == [False, False, True, False, False, False]
    assert layer.experts.down_proj.grad.shape == layer.experts.down_proj.shape


def test_padding_neither_routes_nor_counts_nor_changes_the_others():
    layer = make_layer(balancers=[AuxLoss(1.0)])
    x = torch.randn(2, 6, D)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    layer.context.begin(mask, None)
    y = layer(x)
    [aux] = layer.context.aux_losses
    load = layer.load.take()
    assert y[1, 2:].abs().max() == 0
    assert load.counts_E.sum() == 2 * 8 and load.tokens == 8

    layer.context.begin(None, None)
    alone = copy.deepcopy(layer)
    real = x.reshape(-1, D)[mask.flatten().bool()].unsqueeze(0)
    torch.testing.assert_close(alone(real)[0], y.reshape(-1, D)[mask.flatten().bool()], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alone.context.aux_losses[0], aux)
    alone_load = alone.load.take()
    assert torch.equal(alone_load.counts_E, load.counts_E)
    torch.testing.assert_close(alone_load.entropy, load.entropy)


def test_a_micro_batch_of_nothing_but_padding_gives_zeros_and_zero_gradients():
    layer = make_layer(balancers=[AuxLoss(1.0)])
    x = torch.randn(1, 4, D, requires_grad=True)
    layer.context.begin(torch.zeros(1, 4), None)
    y = layer(x)
    (y.sum() + layer.context.aux_losses[0]).backward()
    assert y.abs().max() == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in layer.parameters())


def test_loads_tell_image_tokens_apart():
    layer = make_layer(top_k=2)
    image = torch.tensor([[True, True, False, False, False]])
    layer.context.begin(torch.tensor([[1, 1, 1, 1, 0]]), image)
    layer(torch.randn(1, 5, D))
    load = layer.load.take()
    assert (load.counts_E.sum(), load.image_E.sum(), load.tokens) == (8, 4, 4)
    assert (load.image_E <= load.counts_E).all() and load.counts_E.dtype == torch.int64
    assert layer.load.take() is None


def test_loads_tell_kinds_of_records_apart():
    layer = make_layer(top_k=2)
    layer.load.kinds = 2
    x = torch.randn(3, 4, D)
    layer.context.kind_BS = torch.tensor([1, -1, 0])[:, None].expand(3, 4)  # the second record has no kind
    layer.context.begin(torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]), None)
    layer(x)
    of_kind_GE = layer.load.take().kind_GE
    for kind, sample, length in ((1, 0, 4), (0, 2, 2)):
        layer.context.begin(None, None)
        layer(x[sample : sample + 1, :length])
        assert torch.equal(of_kind_GE[kind], layer.load.take().counts_E)
    layer.context.begin(torch.ones(3, 4), None)  # said once, for one forward
    layer(x)
    assert layer.load.take().kind_GE.sum() == 0


def test_dropped_are_those_that_capacity_refused_not_those_of_dropout():
    layer = make_layer(top_k=2)
    layer.gate.expert_dropout = 0.5
    layer(torch.randn(1, 9, D))
    dropout = layer.load.take()
    assert dropout.counts_E.sum() < 2 * 9 and dropout.dropped == 0
    layer.gate.expert_dropout, layer.gate.capacity_factor = 0.0, 0.5
    layer(torch.randn(1, 9, D))
    capacity = layer.load.take()
    assert capacity.dropped == 2 * 9 - capacity.counts_E.sum() > 0


@by_device
def test_checkpointed_equals_plain_bit_for_bit_and_counts_once(device):
    plain, checkpointed = (make_layer(balancers=[AuxLoss(0.5)]).to(device) for _ in range(2))
    x = torch.randn(3, 7, D, device=device)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1 = plain(x1)
    y2 = checkpoint(checkpointed, x2, use_reentrant=False, context_fn=checkpoint_contexts)
    for layer, y in ((plain, y1), (checkpointed, y2)):
        (y.square().sum() + sum(layer.context.aux_losses)).backward()
    assert torch.equal(y1, y2) and torch.equal(x1.grad, x2.grad)
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert torch.equal(plain.load.take()[0], checkpointed.load.take()[0])
    assert len(checkpointed.context.aux_losses) == 1


def test_a_recompute_repeats_the_forwards_decision_even_if_the_router_has_changed():
    """Two micro-batches in flight, and a router that would now decide otherwise: each recompute keeps its own."""
    layer = make_layer()
    with torch.no_grad():
        flipped = layer.gate.weight.flip(0).clone()
    inputs = [torch.randn(1, 5, D, requires_grad=True), torch.randn(1, 8, D, requires_grad=True)]
    outputs = []
    for x in inputs:
        layer.context.begin(None, None)
        outputs.append(checkpoint(layer, x, use_reentrant=False, context_fn=checkpoint_contexts))
    seen = []
    original = layer.gate.forward

    def spying(x_TD, token_V=None, chosen=None):
        seen.append(chosen.expert_N)
        return original(x_TD, token_V, chosen)

    expected = [original(x.detach()[0]).expert_N for x in inputs]
    layer.gate.forward = spying
    layer.gate.weight.data.copy_(flipped)
    assert not torch.equal(original(inputs[0].detach()[0]).expert_N, expected[0])  # the negative control
    for output in outputs:
        output.sum().backward()
    assert torch.equal(seen[0], expected[0]) and torch.equal(seen[1], expected[1])


def test_aux_loss_is_k_when_balanced_and_larger_otherwise():
    """f sums to K, P to 1: a uniform router gives exactly K; all on the same K experts gives up to E."""
    layer = make_layer(top_k=2, balancers=[AuxLoss(1.0)])
    with torch.no_grad():
        layer.gate.weight.zero_()
    layer(torch.randn(1, 50, D))
    assert layer.context.aux_losses[0].item() == pytest.approx(2.0, abs=1e-6)
    with torch.no_grad():
        layer.gate.weight[:2] = 5.0
    layer.context.begin(None, None)
    layer(torch.rand(1, 50, D) + 0.5)
    assert layer.context.aux_losses[0].item() == pytest.approx(E, rel=1e-3)


def test_evaluation_leaves_loads_and_losses_alone():
    layer = make_layer(balancers=[AuxLoss(1.0)]).eval()
    layer(torch.randn(1, 5, D))
    assert layer.load.take() is None and layer.context.aux_losses == []


@pytest.mark.parametrize("top_k", [0, E + 1])
def test_impossible_top_k_is_refused(top_k):
    with pytest.raises(ValueError, match="top_k"):
        make_layer(top_k)


def test_samples_that_fill_up_a_batch_neither_route_nor_count_nor_weigh_in_the_aux_loss():
    layer = make_layer(balancers=[AuxLoss(1.0)])
    layer.context.real_BS = torch.tensor([True, False])[:, None].expand(2, 4)
    layer.context.begin(torch.ones(2, 4), None)
    y = layer(torch.randn(2, 4, D))
    assert y[1].abs().max() == 0 and layer.load.take().counts_E.sum() == 2 * 4
    layer.context.real_BS = torch.zeros(2, 4).bool()
    layer.context.begin(torch.ones(2, 4), None)
    layer(torch.randn(2, 4, D))
    assert layer.load.take().counts_E.sum() == 0 and layer.context.aux_losses[0] == 0
    layer.context.begin(torch.ones(2, 4), None)  # the mask was for one forward
    assert layer.context.token_V is None
