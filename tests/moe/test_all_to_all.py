"""The order of events in an all-to-all dispatch, in one process: what starts, what runs meanwhile, what waits."""

import pytest
import torch
from torch import nn

from ds_moe.moe.all_to_all import ExpertParallel, RowCounts
from ds_moe.moe.context import ForwardContext
from ds_moe.moe.dispatch import AllToAllDispatcher, LocalDispatcher, regrouped
from ds_moe.moe.expert_lora import ExpertLoRA
from ds_moe.moe.experts import Experts
from ds_moe.moe.layer import MoELayer
from ds_moe.moe.parts import make_router
from tests.devices import by_device

D, F, E = 12, 20, 4


class Alone(ExpertParallel):
    """One rank that sends to itself and writes down what happens."""

    def __init__(self):
        super().__init__()
        self.log = []

    def all_to_all(self, given, send, receive):
        assert send == receive and sum(send) == given.shape[0]
        name = {torch.int64: "counts"}.get(given.dtype, "rows" if given.dim() == 2 else "weights")
        self.log.append(f"start {name}")
        return given.clone(), Work(self.log, name)


class Work:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait(self):
        self.log.append(f"wait {self.name}")


class Logged(nn.Module):
    """A linear map that writes down its forward and backward."""

    def __init__(self, name, log):
        super().__init__()
        self.name, self.log = name, log
        self.linear = nn.Linear(D, D)

    def forward(self, x):
        self.log.append(self.name)
        y = self.linear(x)
        y.register_hook(lambda grad: self.log.append(f"{self.name} backward"))
        return y


def build(dispatcher, shared=None, frozen_router=False, updated=False):
    torch.manual_seed(0)
    gate, gate_up, down = (nn.Parameter(torch.randn(*shape)) for shape in ((E, D), (E, 2 * F, D), (E, D, F)))
    gate.requires_grad_(not frozen_router)
    lora = ExpertLoRA(gate_up, down, rank=8, scaling=2.0, dropout=0.0, seed=0) if updated else None
    for name, parameter in lora.named_parameters() if lora is not None else ():
        if name.endswith("B"):
            torch.nn.init.normal_(parameter)
    experts = Experts(gate_up, down, lora=lora)
    return MoELayer(make_router("topk", gate, 2), experts, dispatcher, ForwardContext(), index=0, shared=shared)


def logged(chunks):
    ep = Alone()
    layer = build(AllToAllDispatcher(ep, chunks=chunks), Logged("shared", ep.log))
    run, numbers = layer.experts._run, iter(range(chunks))

    def logging_run(*given):
        ep.log.append(f"experts {next(numbers)}")
        return run(*given)

    layer.experts._run = logging_run
    return layer, ep.log


def test_the_shared_expert_runs_while_rows_travel():
    layer, log = logged(chunks=1)
    y = layer(torch.randn(1, 7, D, requires_grad=True))
    out, arrived = ["start rows", "start weights"], ["wait rows", "wait weights"]
    assert log == ["start counts", "wait counts", *out, "shared", *arrived, "experts 0", "start rows", "wait rows"]
    log.clear()
    y.sum().backward()
    assert log == ["start rows", "wait rows", *out, "shared backward", *arrived]


def test_chunks_travel_while_others_are_computed():
    layer, log = logged(chunks=2)
    y = layer(torch.randn(1, 7, D, requires_grad=True))
    out, arrived = ["start rows", "start weights"], ["wait rows", "wait weights"]
    assert log == [
        *("start counts", "wait counts", *out, *out, "shared"),
        *(*arrived, "experts 0", "start rows", *arrived, "experts 1", "start rows", "wait rows", "wait rows"),
    ]
    log.clear()
    y.sum().backward()  # chunk 1 is computed while the gradients of chunk 0 arrive, and so on
    assert log == [
        *("start rows", "start rows", "wait rows", *out, "wait rows", *out, "shared backward", *arrived, *arrived),
    ]


@by_device
@pytest.mark.parametrize("updated", [False, True], ids=["experts", "experts with LoRA"])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_an_all_to_all_with_oneself_changes_nothing(chunks, updated, device):
    x = torch.randn(2, 9, D, device=device)
    results = []
    for dispatcher in (LocalDispatcher(), AllToAllDispatcher(Alone(), chunks=chunks)):
        layer, given = build(dispatcher, updated=updated).to(device), x.clone().requires_grad_()
        y = layer(given)
        y.square().sum().backward()
        results.append((y, given.grad, *(parameter.grad for parameter in layer.parameters())))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()  # added up in another order


def test_a_frozen_router_leaves_the_all_to_alls_as_they_are():
    """Every rank must take part in the same ones, whatever it trains."""
    logs = []
    for frozen, input_grad in ((False, True), (True, True), (False, False)):
        layer = build(AllToAllDispatcher(Alone()), frozen_router=frozen)
        layer(torch.randn(1, 5, D, requires_grad=input_grad)).sum().backward()
        logs.append(layer.dispatcher.ep.log)
    assert logs[0] == logs[1] == logs[2]


def test_without_a_gradient_upstream_nothing_is_sent_upstream():
    layer = build(AllToAllDispatcher(Alone()), frozen_router=True)
    layer(torch.randn(1, 5, D)).sum().backward()
    assert layer.dispatcher.ep.log[-2:] == ["start rows", "wait rows"]  # the experts' own gradients came, and stayed
    assert layer.experts.down_proj.grad.abs().sum() > 0


def test_rows_in_a_wrong_order_are_noticed(monkeypatch):
    """The negative control of the comparisons with one rank."""
    x = torch.randn(2, 9, D)
    expected = build(LocalDispatcher())(x)
    monkeypatch.setattr("ds_moe.moe.dispatch.regrouped", lambda counts, rows: torch.arange(rows).roll(1))
    assert (build(AllToAllDispatcher(Alone()))(x) - expected).abs().max() > 1e-3


def test_the_layer_reads_nothing_on_the_host_but_the_counts_of_an_all_to_all(monkeypatch):
    reads: list[str] = []
    for name in ("tolist", "item", "__bool__", "__int__", "nonzero"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, original=original, name=name, **k: reads.append(name) or original(*a, **k)
        )
    for dispatcher, expected in ((LocalDispatcher(), []), (AllToAllDispatcher(Alone()), ["tolist"])):
        layer = build(dispatcher).train()
        reads.clear()
        layer(torch.randn(1, 7, D)).sum().backward()
        assert reads == expected


def test_rows_change_groups_without_a_sort():
    counts_AB = torch.tensor([[2, 0, 3], [1, 4, 0], [0, 0, 0], [5, 1, 1]])
    b_R = torch.arange(3).repeat(4).repeat_interleave(counts_AB.flatten())
    assert torch.equal(regrouped(counts_AB, len(b_R)), torch.argsort(b_R, stable=True))
    there, back = regrouped(counts_AB, len(b_R)), regrouped(counts_AB.T, len(b_R))
    assert torch.equal(b_R[there][back], b_R)


def test_counts_are_of_each_chunk():
    ep = Alone()
    send, receive = RowCounts(torch.tensor([[[1, 2], [3, 4]]]), ep).on_host()
    assert send == receive == [[3], [7]]
