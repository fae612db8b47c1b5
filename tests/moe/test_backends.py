"""Every backend against `reference`, and that against eager arithmetic in float64: empty experts, no rows, one row."""

import logging

import pytest
import torch

from ds_moe.moe.backends import BACKENDS, Backend, Permutation, backend_for, choose_backend
from ds_moe.moe.backends.grouped_mm import GroupedMM, warn_once
from ds_moe.moe.backends.megablocks import Megablocks
from ds_moe.moe.backends.reference import Reference
from tests.devices import by_device

D, WIDTH = 16, 24  # of the model and of an expert; 2 * WIDTH != D
COUNTS = {
    "even": [4, 4, 4, 4],
    "uneven": [1, 0, 9, 3],
    "all to one": [0, 0, 7, 0],
    "one row": [0, 1, 0, 0],
    "no rows": [0, 0, 0, 0],
}
ON_CPU = ["grouped_mm", "reference"]  # the others have processes of their own


def eager(rows_RD, gate_up_eOD, down_eDF, counts_e, weight_R):
    """Row by row, as transformers' eager experts compute."""
    outputs = [rows_RD[:0]]
    start = 0
    for expert, count in enumerate(counts_e.tolist()):
        for row in range(start, start + count):
            gate, up = (gate_up_eOD[expert] @ rows_RD[row]).split(WIDTH)
            y = down_eDF[expert] @ (gate * torch.sigmoid(gate) * up)
            outputs.append((y if weight_R is None else y * weight_R[row]).unsqueeze(0))
        start += count
    return torch.cat(outputs)


def inputs(counts, dtype, weighted, device="cpu"):
    torch.manual_seed(0)  # the bounds are near: no other draw of another day
    rows = sum(counts)
    tensors = [torch.randn(rows, D), torch.randn(4, 2 * WIDTH, D) * 0.3, torch.randn(4, D, WIDTH) * 0.3]
    tensors = [tensor.to(device, dtype) for tensor in tensors]
    weight_R = torch.rand(rows, dtype=torch.promote_types(dtype, torch.float32)).to(device) if weighted else None
    return tensors, weight_R, torch.randn(rows, D).to(device, dtype)


def results(run, tensors, weight_R, direction_RD, counts):
    """Output and gradients of a copy of the inputs."""
    rows, gate_up, down = (tensor.clone().requires_grad_() for tensor in tensors)
    weight = None if weight_R is None else weight_R.clone().requires_grad_()
    y = run(rows, gate_up, down, torch.tensor(counts, device=rows.device), weight)
    wanted = [rows, gate_up, down] + ([] if weight is None else [weight])
    return (y, *torch.autograd.grad(y, wanted, direction_RD, allow_unused=True))


def swiglu(kind, recompute="act"):
    backend = BACKENDS[kind]()
    return lambda rows, gate_up, down, counts, weight: backend.swiglu(rows, gate_up, down, counts, weight, recompute)


def assert_close(ours, theirs, relative):
    """Differences relative to each tensor's largest entry, or to 4 where all are smaller: what is added up for a
    combine weight's gradient is of that size, and cancels."""
    for one, other in zip(ours, theirs, strict=True):
        other = torch.zeros_like(one) if other is None else other
        assert one.shape == other.shape
        if one.numel():
            scale = max(other.abs().max().item(), 4.0)
            assert (one.double() - other.double()).abs().max().item() <= relative * scale


@by_device
@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("kind", ON_CPU)
def test_float64_equals_eager(kind, weighted, counts, device):
    tensors, weight_R, direction = inputs(counts, torch.float64, weighted, device)
    expected = results(eager, tensors, weight_R, direction, counts)
    for recompute in ("none", "act", "all"):
        assert_close(results(swiglu(kind, recompute), tensors, weight_R, direction, counts), expected, 1e-14)


@by_device
@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("recompute", ["none", "act", "all"])
def test_fp32_equals_reference(recompute, weighted, counts, device):
    tensors, weight_R, direction = inputs(counts, torch.float32, weighted, device)
    expected = results(swiglu("reference"), tensors, weight_R, direction, counts)
    assert_close(results(swiglu("grouped_mm", recompute), tensors, weight_R, direction, counts), expected, 2e-6)


@by_device
@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("recompute", ["none", "act", "all"])
def test_bf16_is_as_near_to_float64_as_rounding_allows(recompute, weighted, counts, device):
    tensors, weight_R, direction = inputs(counts, torch.bfloat16, weighted, device)
    wide = [tensor.double() for tensor in tensors]
    exact = results(eager, wide, None if weight_R is None else weight_R.double(), direction.double(), counts)
    # The products, the activation, its gradient and the result are each rounded to 8 bits, and errors add up in sums.
    ours = results(swiglu("grouped_mm", recompute), tensors, weight_R, direction, counts)
    assert_close(ours, exact, 8 * 2**-8)
    reference = results(swiglu("reference"), tensors, weight_R, direction, counts)
    assert_close(reference, exact, 8 * 2**-8)


@by_device
@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
@pytest.mark.parametrize("dtype, relative", [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 2**-7)])
def test_multiply_equals_reference(dtype, relative, counts, device):
    weight, rows = torch.randn(4, 40, D).to(device, dtype), torch.randn(sum(counts), D).to(device, dtype)
    pairs = []
    for kind in ("grouped_mm", "reference"):
        w, x = weight.clone().requires_grad_(), rows.clone().requires_grad_()
        y = BACKENDS[kind]().multiply(x, w, torch.tensor(counts, device=device))
        pairs.append((y, *torch.autograd.grad(y.sum(), [x, w])))  # a sum: its gradient has stride 0
    assert_close(*pairs, relative)


def test_the_gradient_of_a_sum_has_no_strides_and_is_taken():
    tensors, weight_R, _ = inputs([4, 0, 4, 4], torch.float32, weighted=True)
    grads = []
    for kind in ON_CPU:
        given = [tensor.clone().requires_grad_() for tensor in tensors]
        y = swiglu(kind)(*given, torch.tensor([4, 0, 4, 4]), weight_R)
        grads.append(torch.autograd.grad(y.sum(), given))
    assert_close(*grads, 1e-6)


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_fused_gradients_pass_gradcheck(fast):
    tensors, weight_R, _ = inputs([2, 0, 3, 1], torch.float64, weighted=True)
    arguments = [tensor.requires_grad_() for tensor in [*tensors, weight_R]]
    for recompute in ("none", "act", "all"):
        run = swiglu("grouped_mm", recompute)
        assert torch.autograd.gradcheck(
            lambda rows, gate_up, down, weight, run=run: run(rows, gate_up, down, torch.tensor([2, 0, 3, 1]), weight),
            arguments,
            fast_mode=fast,  # a random direction in place of every entry
        )


@pytest.mark.parametrize("frozen", [(1, 2), (0,), (0, 1, 2)])
def test_gradients_that_nothing_asks_for_are_not_computed(frozen, monkeypatch):
    calls = []
    for name in ("product", "outer"):
        original = getattr(GroupedMM, name)
        monkeypatch.setattr(
            GroupedMM, name, lambda *given, original=original, name=name: calls.append(name) or original(*given)
        )
    tensors, weight_R, direction = inputs([4, 4, 4, 4], torch.float32, weighted=True)
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index not in frozen)
    y = swiglu("grouped_mm")(*tensors, torch.tensor([4, 4, 4, 4]), weight_R.requires_grad_())
    calls.clear()
    y.backward(direction)
    assert calls.count("outer") == 2 - len({1, 2} & set(frozen))
    assert calls.count("product") == 1 + (0 not in frozen)
    assert [tensor.grad is None for tensor in tensors] == [index in frozen for index in range(3)]


@pytest.mark.parametrize("recompute, kept", [("none", D + 3 * WIDTH), ("act", D + 2 * WIDTH), ("all", D)])
def test_only_what_backward_needs_is_kept(recompute, kept):
    tensors, weight_R, _ = inputs([4, 4, 4, 4], torch.float32, weighted=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t) or t, lambda t: t):
        arguments = [tensor.requires_grad_() for tensor in tensors]
        swiglu("grouped_mm", recompute)(*arguments, torch.tensor([4, 4, 4, 4]), weight_R)
    rows = [tensor.numel() for tensor in sizes if tensor.dim() == 2]
    assert sum(rows) == 16 * kept


def test_what_grouped_mm_refuses_goes_expert_by_expert_and_is_said_once(caplog):
    warn_once.cache_clear()
    weight, rows, counts = torch.randn(2, 6, 7), torch.randn(3, 7), torch.tensor([1, 2])  # rows of 28 bytes
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            y = GroupedMM().multiply(rows, weight, counts)
    assert torch.equal(y, Reference().multiply(rows, weight, counts))
    assert [record.message for record in caplog.records] == [
        "torch's grouped_mm takes no torch.float32 of 7 x 6 (float64, or rows not aligned to 16 bytes): "
        "expert by expert"
    ]


def test_the_comparison_notices_a_swapped_expert():
    tensors, weight_R, direction = inputs([4, 4, 4, 4], torch.float32, weighted=True)
    expected = results(swiglu("reference"), tensors, weight_R, direction, [4, 4, 4, 4])
    tensors[1] = tensors[1][[1, 0, 2, 3]]
    with pytest.raises(AssertionError):
        assert_close(results(swiglu("grouped_mm"), tensors, weight_R, direction, [4, 4, 4, 4]), expected, 1e-6)


@by_device
@pytest.mark.parametrize("experts", [5, 256, 300])
def test_the_sort_is_stable_and_counts(experts, device):
    expert_N = torch.randint(0, experts, (1000,)).to(device)
    order_N, counts_E = Backend().sort(expert_N, experts)
    assert torch.equal(order_N, torch.argsort(expert_N, stable=True))
    assert torch.equal(counts_E, torch.bincount(expert_N, minlength=experts))


@by_device
@pytest.mark.parametrize(
    "dtype, half_a_place", [(torch.float32, 2**-22), (torch.float64, 1e-14), (torch.bfloat16, 2**-8)]
)
def test_rows_are_added_up_in_fp32_and_rounded_once(dtype, half_a_place, device):
    """Tokens with three rows, none, one, two and eight; some of the sums cancel."""
    rows_ND = torch.randn(14, 200).to(device, dtype)
    rows_ND[5] = -rows_ND[4] + 0.01
    place_N, start_T = torch.tensor([4, 0, 5, 2, 1, 3, *range(6, 14)]), torch.tensor([0, 3, 3, 4, 6])
    unused = torch.empty(0)
    permutation = Permutation(unused, unused, unused, place_N.to(device), start_T.to(device), None)
    exact_TD = torch.stack([rows_ND[list(rows)].double().sum(0) for rows in ([4, 0, 5], [], [2], [1, 3], range(6, 14))])
    difference_TD = (Backend().sum_per_token(rows_ND, permutation).double() - exact_TD).abs()
    assert (difference_TD <= half_a_place * exact_TD.abs() + (1e-6 if dtype != torch.float64 else 1e-14)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[0, 3, 0, 9], [130, 0, 257, 64], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("kind", sorted(BACKENDS))
def test_every_backend_of_this_gpu_equals_float64_beside_memory_full_of_nan(kind, counts):
    """Blocks that the allocator hands out again hold what was in them: a row that a kernel leaves unwritten is NaN."""
    if obstacle := BACKENDS[kind].obstacle("cuda"):
        pytest.skip(obstacle)
    tensors, weight_R, direction = inputs(counts, torch.bfloat16, True, "cuda")
    exact = results(eager, [one.double() for one in tensors], weight_R.double(), direction.double(), counts)
    poison = torch.full((2**26,), float("nan"), device="cuda")
    del poison
    assert_close(results(swiglu(kind), tensors, weight_R, direction, counts), exact, 8 * 2**-8)


def test_auto_chooses_and_says_why(caplog):
    assert choose_backend("cpu", torch.float32)[0] == "grouped_mm"
    with caplog.at_level(logging.INFO, logger="ds_moe.moe.backends"):
        assert isinstance(backend_for("auto", torch.zeros(1, dtype=torch.float16)), GroupedMM)
    [record] = caplog.records
    assert "backend grouped_mm for torch.float16 on cpu" in record.message


@pytest.mark.parametrize(
    "capability, dtype, packages, expected",
    [
        ((9, 0), torch.bfloat16, ("grouped_gemm", "megablocks"), "grouped_mm"),
        ((10, 0), torch.bfloat16, (), "grouped_mm"),
        ((12, 0), torch.bfloat16, ("grouped_gemm", "megablocks"), "megablocks"),
        ((8, 0), torch.bfloat16, ("grouped_gemm",), "grouped_mm"),
        ((8, 0), torch.bfloat16, ("grouped_gemm", "megablocks"), "megablocks"),
        ((8, 0), torch.bfloat16, ("megablocks",), "grouped_mm"),
        ((8, 0), torch.float32, ("grouped_gemm", "megablocks"), "grouped_mm"),
    ],
)
def test_auto_on_a_gpu(monkeypatch, capability, dtype, packages, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(Megablocks, "obstacle", lambda device: None if "megablocks" in packages else "not installed")
    monkeypatch.setattr("ds_moe.moe.backends.compiled", lambda name: name in packages)
    assert choose_backend("cuda", dtype)[0] == expected
