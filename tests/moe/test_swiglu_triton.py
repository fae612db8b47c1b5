"""SwiGLU's Triton kernels against torch's operators and float64, interpreted; compiled for GPUs that are not here."""

import pytest
import torch

from ds_moe.moe.backends import swiglu
from ds_moe.moe.backends.optional import obstacle
from tests.moe.processes import reported

needs_triton = pytest.mark.skipif(obstacle({}, "cuda") is not None, reason=f"{obstacle({}, 'cuda')}")
ROUNDING = {"float32": 1e-6, "float16": 2**-10}  # results are rounded once; between them all is fp32


@needs_triton
def test_interpreted_kernels_equal_torch_and_float64():
    found = reported("swiglu_triton_cases", TRITON_INTERPRET="1")
    assert len(found["results"]) == 16
    for name, result in found["results"].items():
        bound = ROUNDING[name.split(", ")[1]]
        assert result["exact"] <= bound and result["torch"] <= bound, (name, result)
    assert found["wrong"] > 0.1 and found["summed_in"] == "torch.float32"


@needs_triton
@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here():
    found = reported("swiglu_triton_cases", "ahead")["compiled"]
    assert len(found) == 12
    for name, result in found.items():
        assert result["target"].startswith(name.split()[0]) and result["bytes"] > 1000, (name, result)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(513, 768), (1, 5000), (0, 96)])
def test_on_a_gpu(dtype, weighted, shape, monkeypatch):
    rows, width = shape
    both, grad = (
        torch.randn(rows, 2 * width, device="cuda", dtype=dtype),
        torch.randn(rows, width, device="cuda", dtype=dtype),
    )
    weight = torch.rand(rows, device="cuda") if weighted else None
    found = [swiglu._activate(both, weight, False)[0], *swiglu._activate_backward(both, None, weight, grad)]
    assert swiglu._kernels(both, weight) is not None
    monkeypatch.setattr(swiglu, "_kernels", lambda *given: None)
    plain = [swiglu._activate(both, weight, False)[0], *swiglu._activate_backward(both, None, weight, grad)]
    for ours, theirs in zip(found, plain, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_rows_that_the_kernels_do_not_take_are_torchs():
    triton = pytest.importorskip("ds_moe.moe.backends.swiglu_triton")
    assert swiglu._kernels(torch.randn(4, 8), None) is None  # of a CPU
    both, weight = torch.randn(4, 8), torch.rand(4)
    assert triton.takes(both, weight) and triton.takes(both.bfloat16(), None)
    assert not triton.takes(both.double(), None)  # sums would be of fp32
    assert not triton.takes(both, weight.double()) and not triton.takes(both.T, None)
