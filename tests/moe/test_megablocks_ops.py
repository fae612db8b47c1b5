"""What stands in for the compiled parts of megablocks, against naive references; and when it does."""

import sys
import types

import pytest
import torch

from ds_moe.moe.backends import megablocks_ops
from ds_moe.moe.backends.megablocks_ops import torch_grouped_gemm, torch_ops
from ds_moe.moe.backends.reference import Reference


@pytest.fixture
def ops():
    return torch_ops()


def test_sort_looks_at_the_lowest_bits_only(ops):
    x_N = torch.tensor([5, 2, 4, 1], dtype=torch.int32)
    x_out_N, iota_out_N = torch.empty_like(x_N), torch.empty_like(x_N)
    ops.sort(x_N, 2, x_out_N, iota_out_N)
    assert x_out_N.tolist() == [4, 5, 1, 2] and iota_out_N.tolist() == [2, 0, 3, 1]


@pytest.mark.parametrize(
    "dtype, end_bits", [(torch.int16, [1, 8, 14]), (torch.int32, [3, 9, 30]), (torch.int64, [9, 62])]
)
def test_sort(ops, dtype, end_bits):
    for end_bit in end_bits:
        assert_sorts(ops, torch.randint(0, 2**end_bit, (200,)).to(dtype), end_bit)


def assert_sorts(ops, x_N, end_bit):
    x_out_N, iota_out_N = torch.empty_like(x_N), torch.empty_like(x_N)
    ops.sort(x_N, end_bit, x_out_N, iota_out_N)
    expected = sorted(range(200), key=lambda position: x_N[position].item())
    assert iota_out_N.tolist() == expected and x_out_N.tolist() == [x_N[position].item() for position in expected]


@pytest.mark.parametrize("shape", [(50,), (3, 20), (0,), (2, 0)])
def test_histogram(ops, shape):
    x = torch.randint(0, 5, shape, dtype=torch.int32)
    counts = ops.histogram(x, 7)
    rows = x.tolist() if len(shape) == 2 else [x.tolist()]
    assert counts.dtype == torch.int32 and counts.shape == (*shape[:-1], 7)
    assert counts.view(-1, 7).tolist() == [[row.count(value) for value in range(7)] for row in rows]


def test_cumsums(ops):
    x = torch.randint(0, 100, (2, 9), dtype=torch.int32)
    inclusive, exclusive = torch.empty_like(x), torch.empty_like(x)
    ops.inclusive_cumsum(x, 1, inclusive)
    ops.exclusive_cumsum(x, 1, exclusive)
    assert inclusive.tolist() == [[sum(row[: i + 1]) for i in range(9)] for row in x.tolist()]
    assert exclusive.tolist() == [[sum(row[:i]) for i in range(9)] for row in x.tolist()]


def test_replicate(ops):
    """Bins of 2, 0, 3 and 1 positions; two positions lie past the last."""
    bins_E, x_BE = torch.tensor([2, 2, 5, 6], dtype=torch.int32), torch.randn(2, 4).half()
    out_BN, grad_BN, back_BE = torch.empty(2, 8).half(), torch.randn(2, 8).half(), torch.empty(2, 4).half()
    ops.replicate_forward(x_BE, bins_E, out_BN)
    ops.replicate_backward(grad_BN, bins_E, back_BE)
    assert torch.equal(out_BN[:, :6], x_BE[:, [0, 0, 2, 2, 2, 3]])
    slices = [slice(0, 2), slice(2, 2), slice(2, 5), slice(5, 6)]
    expected_BE = torch.stack([grad_BN[:, part].float().sum(1) for part in slices], dim=1)
    assert torch.equal(back_BE, expected_BE.half())


def test_indices(ops):
    """Experts of 2, 0 and 1 blocks of rows, each three blocks wide."""
    out = torch.empty(9, dtype=torch.int16)
    ops.indices(torch.tensor([256, 256, 384], dtype=torch.int32), 128, 3, 3, out)
    assert out.tolist() == [0, 1, 2, 0, 1, 2, 6, 7, 8]


@pytest.mark.parametrize("trans_b", [True, False])
def test_grouped_gemm(trans_b):
    gmm = torch_grouped_gemm()
    counts = torch.tensor([3, 0, 2])
    a, b = torch.randn(5, 8), torch.randn(3, *((12, 8) if trans_b else (8, 12)))
    results = []
    for run in (gmm.ops.gmm, lambda a, b, counts, trans_b: Reference().product(a, b.mT if trans_b else b, counts)):
        given = [tensor.clone().requires_grad_() for tensor in (a, b)]
        y = run(*given, counts, trans_b)
        results.append((y, *torch.autograd.grad(y.square().sum(), given)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    into = torch.empty(5, 12)
    assert gmm.backend.gmm(a, b, counts, trans_b=trans_b, c=into) is into
    torch.testing.assert_close(into, results[1][0])
    torch.testing.assert_close(
        gmm.backend.gmm(a, into, counts, trans_a=True), Reference().outer(a, into.detach(), counts)
    )


def test_stand_ins_never_replace_a_compiled_part(monkeypatch):
    real = types.ModuleType("megablocks_ops")
    modules = {"megablocks_ops": real}
    monkeypatch.setattr(megablocks_ops, "sys", types.SimpleNamespace(modules=modules))
    monkeypatch.setattr(megablocks_ops, "compiled", {"megablocks_ops": real}.get)
    megablocks_ops.install_stand_ins()
    first = modules["grouped_gemm"]
    megablocks_ops.install_stand_ins()
    assert modules == {"megablocks_ops": real, "grouped_gemm": first}
    assert megablocks_ops.active() == "compiled megablocks_ops, torch grouped_mm"


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    """A folder in which `megablocks_ops` is imported from; nothing of it is remembered."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "megablocks_ops", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    megablocks_ops.compiled.cache_clear()
    yield tmp_path
    sys.modules.pop("megablocks_ops", None)
    megablocks_ops.compiled.cache_clear()


def test_a_compiled_part_is_used_but_not_in_the_interpreter(extensions, monkeypatch):
    (extensions / "megablocks_ops.py").write_text("")
    assert megablocks_ops.active().startswith("compiled megablocks_ops")
    megablocks_ops.compiled.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert megablocks_ops.active().startswith("torch ops")


def test_a_broken_compiled_part_is_named_and_replaced(extensions, caplog):
    (extensions / "megablocks_ops.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    assert megablocks_ops.active().startswith("torch ops") and megablocks_ops.active().startswith("torch ops")
    [record] = caplog.records  # once
    assert "megablocks_ops is installed" in record.message and "_ZN3c10" in record.message
