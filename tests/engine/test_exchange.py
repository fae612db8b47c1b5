"""Another set of weights in the place of a model's own: of one process without DeepSpeed, and of ranks under ZeRO-3."""

import torch

from ds_moe.engine.exchange import FrozenCopy
from tests.launcher import run_ranks


def test_forwards_inside_are_those_of_the_copy_and_nothing_of_it_stays():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).to(torch.bfloat16).eval()
    at_start, given = {key: value.clone() for key, value in model.state_dict().items()}, torch.ones(2, 4).bfloat16()
    copy, first = FrozenCopy(model, model.buffers()), model(given)
    with torch.no_grad():
        for value in (*model.parameters(), model[1].running_mean):
            value += 0.25
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    held = [value.data_ptr() for value in model.state_dict().values()]
    for _ in range(2):
        with copy.in_place():
            assert torch.equal(model(given), first)
            assert all(torch.equal(value, at_start[key]) for key, value in model.state_dict().items())
        assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())
    assert held == [value.data_ptr() for value in model.state_dict().values()]  # an optimizer refers to these


def test_shares_are_exchanged_where_parameters_are_offloaded_too():
    """Two ranks, EP 2, ZeRO-3: small weights are kept gathered, with `offload_param` all lie in host memory."""
    for rank in run_ranks("tests/engine/exchange_ranks.py", 2).json_by_rank:
        for name in ("plain", "offloaded"):
            inside, after, moved = rank[name]
            assert all(inside) and all(after) and all(moved), (name, rank[name])
