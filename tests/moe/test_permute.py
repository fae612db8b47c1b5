"""Rows from tokens to experts and back, against indexing and index_add in float64: any list, any order of tokens."""

import pytest
import torch

from ds_moe.moe.backends import Backend
from ds_moe.moe.permute import inverse, permute, sort_by_expert, sum_per_token, to_experts
from tests.devices import by_device

T, D, E = 7, 5, 4
LISTS = {  # tokens of the assignments
    "top-k": torch.arange(T).repeat_interleave(2),
    "tokens in any order, some without": torch.tensor([5, 0, 2, 5, 5, 1, 0]),
    "one assignment": torch.tensor([3]),
    "none": torch.empty(0, dtype=torch.int64),
}


@by_device
@pytest.mark.parametrize("name", LISTS)
def test_to_experts_and_sum_per_token_equal_indexing(name, device):
    token_N = LISTS[name].to(device)
    expert_N = torch.randint(0, E, token_N.shape).to(device)
    top_k = 2 if name == "top-k" else None
    permutation = sort_by_expert(Backend(), token_N, expert_N, T, E, top_k)
    sorted_N = torch.argsort(expert_N, stable=True)
    assert torch.equal(permutation.token_N, token_N[sorted_N])
    x_TD = torch.randn(T, D, dtype=torch.float64, device=device, requires_grad=True)
    rows_ND = torch.randn(len(token_N), D, dtype=torch.float64, device=device, requires_grad=True)
    sums_TD = torch.zeros_like(x_TD).index_add(0, token_N[sorted_N], rows_ND)
    pairs = [
        (to_experts(Backend(), x_TD, permutation), x_TD[token_N[sorted_N]], x_TD),
        (sum_per_token(Backend(), rows_ND, permutation), sums_TD, rows_ND),
    ]
    for ours, expected, given in pairs:
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)
        direction = torch.randn_like(ours)
        for one, other in zip(*(torch.autograd.grad(y, given, direction) for y in (ours, expected)), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_a_general_list_is_what_the_top_k_shortcut_gives():
    token_N, expert_N = LISTS["top-k"], torch.randint(0, E, (2 * T,))
    short, general = (sort_by_expert(Backend(), token_N, expert_N, T, E, top_k) for top_k in (2, None))
    assert all(torch.equal(one, other) for one, other in zip(short[:-1], general[:-1], strict=True))


@by_device
def test_permute_and_its_gradient(device):
    order = torch.randperm(6).to(device)
    values = torch.randn(6, 3, device=device, requires_grad=True)
    direction = torch.randn(6, 3, device=device)
    assert torch.equal(permute(values, order), values[order])
    assert torch.equal(torch.autograd.grad(permute(values, order), values, direction)[0], direction[inverse(order)])
