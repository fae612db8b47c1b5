"""Every backend against `reference`, forward and backward: non-square, empty experts, no rows, one row."""

import pytest
import torch

from ds_moe.moe.backends import BACKENDS, reference

COUNTS = {
    "even": [4, 4, 4, 4],
    "uneven": [1, 0, 9, 3],
    "all to one": [0, 0, 7, 0],
    "one row": [0, 1, 0, 0],
    "no rows": [0, 0, 0, 0],
}


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backend_equals_reference(backend, counts, dtype):
    inner, outer = 16, 40
    weight = torch.randn(4, outer, inner).to(dtype)
    rows = torch.randn(sum(counts), inner).to(dtype)
    direction = torch.randn(sum(counts), outer).to(dtype)
    results = []
    for multiply in (BACKENDS[backend], reference):
        w, x = weight.clone().requires_grad_(), rows.clone().requires_grad_()
        y = multiply(x, w, torch.tensor(counts))
        results.append((y, *torch.autograd.grad((y * direction).sum(), [x, w])))
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7  # bf16: one unit in the last place
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        scale = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * max(scale, 1.0))


def test_the_comparison_notices_a_swapped_expert():
    weight = torch.randn(4, 40, 16)
    rows, counts = torch.randn(8, 16), torch.tensor([2, 2, 2, 2])
    swapped = weight[[1, 0, 2, 3]]
    assert not torch.allclose(BACKENDS["grouped_mm"](rows, swapped, counts), reference(rows, weight, counts))
