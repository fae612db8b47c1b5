"""megablocks' own Triton kernels and layers against ours: interpreted on the CPU, compiled for an H100, over ranks."""

import sys
import types

import pytest
import torch

from ds_moe.errors import UserError
from ds_moe.moe.backends import megablocks, megablocks_ops, optional
from ds_moe.moe.backends.grouped_mm import GroupedMM
from ds_moe.moe.backends.megablocks import Megablocks
from ds_moe.moe.backends.reference import Reference
from tests.launcher import ROOT, run_ranks
from tests.moe.processes import reported

INTERPRETED = {"TRITON_INTERPRET": "1"}
OBSTACLE = megablocks_ops.megablocks_obstacle("cuda")
installed = pytest.mark.skipif(OBSTACLE is not None, reason=f"megablocks: {OBSTACLE}")


# --- the real kernels


@pytest.fixture(scope="module")
def cases():
    return reported("megablocks_cases", **INTERPRETED)


def check_lists(lists):
    for name, result in lists.items():
        assert result["sorted as torch does"] and result["to experts as torch does"], name
        assert result["excess"] <= 0, f"{name}: sums are further from float64 than one rounding: {result}"
        assert result["launched"] == result["wanted"], f"{name}: torch did what the kernels should have done"


@installed
def test_rows_move_as_torch_moves_them(cases):
    assert len(cases["lists"]) == 3
    check_lists(cases["lists"])
    assert all(cases["sorts"].values()), cases["sorts"]


@installed
@pytest.mark.slow
def test_every_list_in_every_dtype_moves_as_torch_moves_it():
    lists = reported("megablocks_cases", "slow", **INTERPRETED)["lists"]
    assert len(lists) == 3 * 13
    check_lists(lists)


@installed
def test_float64_which_the_kernels_would_round_goes_through_torch(cases):
    result = cases["float64"]
    assert result["launched"] == [] and result["to experts as torch does"] and result["excess"] <= 0


@installed
def test_a_wrong_order_is_noticed(cases):
    assert [result["to experts as torch does"] for result in cases["broken"]] == [False] * 4
    assert min(result["excess"] for result in cases["broken"] if False in result["launched"]) > 0.1


@installed
def test_the_layer_equals_megablocks_own(cases, show):
    show(f"megablocks' dMoE against ours, largest relative difference of output and gradients: {cases['dmoe']}")
    assert max(cases["dmoe"].values()) <= 1e-6
    assert cases["dmoe_wrong"] > 0.1  # two experts exchanged
    assert cases["active"] == "torch ops in place of megablocks_ops, torch grouped_mm"


@installed
def test_a_whole_model_equals_one_with_the_reference_backend(cases):
    for worst, name in cases["model"]["worst"]:
        assert worst <= 1e-6, name
    # Forward and backward move rows twice each; where the list has no fixed top_k, only the spreads are kernels.
    assert cases["model"]["launches"] == 4 + 2


@pytest.mark.slow
@installed
def test_experts_over_two_ranks_equal_all_on_one():
    run = run_ranks("tests/moe/megablocks_ranks.py", 2, env=INTERPRETED)
    for rank, results in enumerate(run.json_by_rank):
        assert len(results) == 5
        for name, result in results.items():
            assert result["difference"] <= 1e-6, (name, rank, result)
    received = [results["a rank without rows"]["received"] for results in run.json_by_rank]
    assert sorted(received) == [[0], [8]]
    assert [results["uniform"]["launches"] for results in run.json_by_rank] == [4, 4]
    assert [results["a rank of padding, chunks"]["launches"] for results in run.json_by_rank] == [4, 0]


@pytest.mark.slow
@installed
def test_the_kernels_compile_for_an_h100(tmp_path):
    results = reported("megablocks_ahead", TRITON_CACHE_DIR=str(tmp_path))
    assert len(results["compiled"]) == 6
    for name, result in results["compiled"].items():
        assert result["target"] == "sm_90a" and result["bytes"] > 1000, name
    # megablocks found what stands in for grouped_gemm, and nobody else will.
    assert not results["warnings"] and results["grouped_gemm"] == [True, False]


# --- where it cannot be used


def test_what_is_missing_is_named_with_the_fix(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(optional, "find_spec", lambda name: None if name == "megablocks" else name)
    lines = (ROOT / "requirements/megablocks.txt").read_text().splitlines()
    pins = " ".join(line for line in lines if line and not line.startswith("#"))
    assert f"pip install --no-deps --no-build-isolation {pins}" in megablocks_ops.megablocks_obstacle("cuda")
    assert "pip install --no-deps --no-build-isolation -r requirements/megablocks.txt" in lines[0]
    monkeypatch.setattr(optional, "find_spec", lambda name: None if name == "triton" else name)
    assert megablocks_ops.megablocks_obstacle("cuda").startswith("triton is not installed")
    monkeypatch.setattr(optional, "find_spec", lambda name: name)
    assert megablocks_ops.megablocks_obstacle("cuda") is None
    assert "TRITON_INTERPRET=1" in megablocks_ops.megablocks_obstacle("cpu")
    megablocks_ops.load_megablocks.cache_clear()
    with pytest.raises(UserError, match="moe.experts.backend=megablocks: .*TRITON_INTERPRET=1"):
        Megablocks().sort(torch.tensor([0, 1]), 2)


def test_too_late_for_the_interpreter(monkeypatch):
    compiled = types.SimpleNamespace(language=types.SimpleNamespace(cdiv=object()))
    monkeypatch.setitem(sys.modules, "triton", compiled)
    monkeypatch.setattr(optional, "find_spec", lambda name: name)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "after Triton was imported" in megablocks_ops.megablocks_obstacle("cpu")


# --- grouped_gemm, which needs CUDA: its checks and semantics, after csrc/grouped_gemm.cu of 0.3.0


class StrictGemm:
    def __init__(self):
        self.sizes = []

    def __call__(self, a, b, batch_sizes, trans_a=False, trans_b=False, c=None):
        assert batch_sizes.device.type == "cpu" and batch_sizes.dtype == torch.int64 and batch_sizes.dim() == 1
        assert a.is_contiguous() and b.is_contiguous() and a.dtype == b.dtype == torch.bfloat16
        assert not (trans_a and trans_b) and b.dim() == (2 if trans_a else 3)
        self.sizes.append(batch_sizes)
        if not trans_a:
            assert b.shape[0] == batch_sizes.numel() and b.shape[2 if trans_b else 1] == a.shape[1]
            assert c is None
            return Reference().product(a, b.mT if trans_b else b, batch_sizes)
        assert c.is_contiguous() and c.shape == (batch_sizes.numel(), a.shape[1], b.shape[1])
        assert not c.any()
        for out, left, right in zip(c, a.split(batch_sizes.tolist()), b.split(batch_sizes.tolist()), strict=True):
            if len(left):  # nothing is written where there are no rows
                out.copy_(left.T @ right)
        return c


@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 8, 0], [1], [8]])
def test_grouped_gemm_gets_what_it_takes(monkeypatch, counts):
    gemm, counts_e, rows = StrictGemm(), torch.tensor(counts), sum(counts)
    monkeypatch.setattr(megablocks, "grouped_gemm", lambda rows: gemm)
    tensors = torch.randn(rows, 16), torch.randn(len(counts), 48, 16), torch.randn(len(counts), 16, 24)
    direction_RD, weight_R, results = torch.randn(rows, 16).bfloat16(), torch.rand(rows), []
    for backend in (Megablocks(), GroupedMM()):
        given = [tensor.bfloat16().requires_grad_() for tensor in tensors]
        y = backend.swiglu(*given, counts_e, weight_R, "act")
        results.append((y, *torch.autograd.grad(y, given, direction_RD)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7 * theirs.abs().max().item())
    assert len(gemm.sizes) == 6 and len({id(sizes) for sizes in gemm.sizes}) == 1, "counts travel once a layer"


def test_what_int32_offsets_cannot_reach_goes_through_torch():
    assert not megablocks._moves(torch.empty(2**21, 1024, device="meta"))
    assert megablocks._moves(torch.empty(2**21 - 1, 1024, device="meta"))


def test_grouped_gemm_is_asked_for_nothing_else():
    assert megablocks.grouped_gemm(torch.randn(2, 8).bfloat16()) is None  # on the CPU
    y = Megablocks().product(torch.randn(0, 8), torch.randn(2, 8, 16), torch.tensor([0, 0]))
    assert y.shape == (0, 16)
