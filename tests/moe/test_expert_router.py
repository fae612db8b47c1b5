"""`ExpertRouter`, `ExpertChoiceRouter` and `LoadBalancingLoss`: the names people look for, in a loop of their own."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ds_moe.moe.standalone import ExpertChoiceRouter, ExpertRouter, LoadBalancingLoss
from tests.moe.routing import PLAIN, D, logits_of, max_vio, oracle_topk, states

DIM, WIDTH, E, K = 20, 12, 7, 2  # an odd number of experts, nothing square


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


class WriteUp(torch.nn.Module):
    """An MoE as blogs write it: a router that returns three things, and a loop over the experts."""

    def __init__(self, **keys):
        super().__init__()
        torch.manual_seed(0)
        self.router = ExpertRouter(dim=DIM, num_experts=E, top_k=K, **keys)
        self.experts = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(DIM, WIDTH), torch.nn.SiLU(), torch.nn.Linear(WIDTH, DIM))
            for _ in range(E)
        )

    def forward(self, x):
        x = x.flatten(0, 1)
        weights, indices, self.aux = self.router(x)
        self.counts_E = torch.bincount(indices.flatten(), minlength=E)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = (indices == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, expert(x[token]) * weights[token, slot].unsqueeze(-1))
        return y


def test_a_router_in_a_loop_of_ones_own_is_balanced_by_its_bias():
    after = {}
    for rate in (None, 1e-2):
        model, generator = WriteUp(loss_free=rate), torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        shared, counts = torch.randn(DIM, generator=generator), []
        for _ in range(100):
            x = torch.randn(4, 64, DIM, generator=generator) + shared
            F.mse_loss(model(x), x.flatten(0, 1).roll(1, -1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.router.end_step()
            counts.append(model.counts_E)
        after[rate] = max_vio(sum(counts[-20:]))
    assert after[1e-2] < 0.2 and after[None] > 0.5


def test_a_router_counts_in_training_only_and_takes_flat_tokens():
    router = ExpertRouter(dim=DIM, num_experts=E, top_k=K, loss_free=1e-2)
    x, mask = torch.randn(2, 9, DIM), torch.ones(2, 9)
    mask[1, 4:] = 0
    weights, indices, aux = router(x, mask)
    flat = router(x.view(-1, DIM), mask.view(-1))
    assert weights.shape == (2, 9, K) and flat[0].shape == (18, K)
    assert torch.equal(weights.view(-1, K), flat[0]) and torch.equal(indices.view(-1, K), flat[1]) and aux == flat[2]
    balancing = router.router.balancing
    assert balancing.counts_E.sum() == 2 * K * 13
    router.eval()(x)
    assert balancing.counts_E.sum() == 2 * K * 13
    router.end_step()
    assert balancing.bias_E.abs().max() > 0 and "router.balancing.bias_E" in router.state_dict()
    with pytest.raises(TypeError, match="num_experts=7.0 must be a whole number"):
        ExpertRouter(dim=DIM, num_experts=7.0, top_k=K)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"jitter_noise": -1.0}, "jitter_noise=-1.0 must be greater than or equal to 0"),
        ({"temperature": 0}, "temperature=0 must be greater than 0"),
        ({"temperature": "hot"}, "temperature='hot' must be a valid number"),
        ({"expert_dropout": 1.5}, "expert_dropout=1.5 must be less than 1"),
        ({"gating_type": "noisy_top_k", "noise_std": -1.0}, "noise_std=-1.0 must be greater than 0"),
    ],
)
def test_a_router_refuses_settings_out_of_range(keys, complaint):
    with pytest.raises((TypeError, ValueError), match=re.escape(complaint)):
        ExpertRouter(DIM, E, K, **keys)


@pytest.mark.parametrize(
    ("x", "mask"),
    [
        (torch.ones(3, DIM), torch.ones(2)),  # the third token would have been taken for padding
        (torch.ones(3, DIM), torch.ones(4)),
        (torch.ones(2, 3, DIM), torch.ones(6)),
        (torch.ones(3, DIM + 1), None),
        (torch.ones(DIM), None),
    ],
)
def test_a_router_refuses_shapes_that_do_not_fit(x, mask):
    with pytest.raises(ValueError, match="must be"):
        ExpertRouter(DIM, E, K)(x, mask)
