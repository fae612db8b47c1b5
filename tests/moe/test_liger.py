"""liger-kernel's own Triton kernels against the reference backend, interpreted on the CPU."""

import pytest
import torch

from ds_moe.errors import UserError
from ds_moe.moe.backends import liger, optional
from ds_moe.moe.backends.liger import Liger
from tests.launcher import ROOT
from tests.moe.processes import reported

installed = pytest.mark.skipif(Liger.obstacle("cuda") is not None, reason=f"liger: {Liger.obstacle('cuda')}")
ROUNDING = {"fp16": 4 * 2**-11, "float64": 1e-14}  # products, activation and result are rounded one after the other
ONE_ROW = torch.tensor([1]), None, "act"


def assert_close(cases):
    for name, result in cases.items():
        assert result["difference"] <= ROUNDING.get(name, 1e-6), (name, result)


@pytest.mark.slow
@installed
def test_outputs_and_gradients_equal_the_reference():
    results = reported("liger_cases", TRITON_INTERPRET="1")
    assert_close(results["cases"])
    assert results["cases"]["uneven"]["wrong"] > 0.1  # the experts exchanged


@installed
@pytest.mark.slow
def test_more_shapes_and_a_whole_layer():
    results = reported("liger_cases", "slow", TRITON_INTERPRET="1")
    assert_close(results["cases"])
    assert results["layer"] <= 1e-6


def test_bf16_is_refused_where_the_interpreter_would_multiply_it_wrongly():
    with pytest.raises(UserError, match="bfloat16.*float32"):
        Liger().swiglu(*(torch.ones(*shape).bfloat16() for shape in ((1, 8), (1, 16, 8), (1, 8, 8))), *ONE_ROW)


def test_what_is_missing_is_named_with_the_fix(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(optional, "find_spec", lambda name: None if name == "liger_kernel" else name)
    assert "pip install --no-deps liger-kernel==0.8.5" in Liger.obstacle("cuda")
    assert "\nliger-kernel==0.8.5\n" in (ROOT / "constraints.txt").read_text()
    monkeypatch.setattr(optional, "find_spec", lambda name: name)
    assert Liger.obstacle("cuda") is None
    liger.load_liger.cache_clear()
    with pytest.raises(UserError, match="moe.experts.backend=liger: .*TRITON_INTERPRET=1"):
        Liger().swiglu(torch.ones(1, 8), torch.ones(1, 16, 8), torch.ones(1, 8, 8), *ONE_ROW)
