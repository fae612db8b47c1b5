"""Experts begin where a grouped product on a GPU takes them: at multiples of 16 bytes, whatever else is trained."""

import pytest
import torch

from ds_moe.engine.build import parameter_groups
from tests.launcher import run_ranks


def test_experts_come_first():
    model = torch.nn.Module()
    for number, name in enumerate(("dense", "expert", "bias", "other")):
        parameter = torch.nn.Parameter(torch.zeros(*((3,) if name == "bias" else (3, number + 1))))
        if name == "expert":
            parameter.allreduce, parameter.group_name = False, "ep_size_2"
        model.register_parameter(name, parameter)
    groups = parameter_groups(model, weight_decay=0.1)
    assert [group.get("moe", False) for group in groups] == [True, False, False]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert groups[0]["params"] == [model.expert] and groups[1]["params"] == [model.dense, model.other]


@pytest.mark.slow  # in `make test`: the order, above
def test_addresses_of_real_engines():
    result = run_ranks("tests/engine/aligned_ranks.py", 2).json
    assert len(result["found"]) == 6 and all(set(found) == {0} for found in result["found"].values())
    assert set(result["broken"]) != {0}, "the negative control: experts behind what is dense"
