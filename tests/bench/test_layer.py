"""The layer's benchmark times every contender that can run here, names the others, and times none that is wrong."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ds_moe.moe.backends import BACKENDS
from tools.bench.layer import bench as bench_layer
from tools.bench.layer import block as layer_block
from tools.bench.layer import contenders as layer_contenders
from tools.bench.layer import growth as layer_growth
from tools.bench.layer import measure as layer_measure

ROOT = Path(__file__).resolve().parents[2]
RIVALS = {"transformers eager", "transformers grouped_mm", "DeepSpeed AutoEP", "DeepSpeed MoE"}
CUDA_RIVALS = {"DeepSpeed AutoEP fused", "megablocks dMoE", "liger LigerExperts"}
OURS = {"ds_moe (default)", "ds_moe recompute none", "ds_moe recompute all", *(f"ds_moe {name}" for name in BACKENDS)}
ROUTINGS = ("uniform", "zipf", "one_hot")


def bench(folder, *arguments):
    """Exit status and the JSON's contents of a small benchmark in this process."""
    file = folder / "new/bench.json"
    words = ["--suite", "smoke", "--repeats", "2", "--threads", "1", "--json", str(file), *arguments]
    return bench_layer.main(words), json.loads(file.read_text())


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        bench_layer.main(["--help"])
    options = ("--suite", "--shape", "--routing", "--repeats", "--growth", "--malloc", "--json")
    printed = capsys.readouterr().out
    assert all(option in printed for option in options)


def test_every_contender_is_timed_or_says_why_not_at_every_routing(tmp_path, capsys):
    status, report = bench(tmp_path)
    assert status == 0
    assert report["environment"]["threads"] == 1 and report["shapes"]["tiny"]["E"] == 4
    printed = capsys.readouterr().out
    for routing in ROUTINGS:
        results = {result["contender"]: result for result in report["results"] if result["routing"] == routing}
        assert set(results) == {bench_layer.GEMM, bench_layer.ROOFLINE} | OURS | RIVALS | CUDA_RIVALS
        assert (
            results[bench_layer.GEMM]["of_gemm"] == pytest.approx(1) and len(results[bench_layer.GEMM]["seconds"]) == 2
        )
        unavailable = {name: result["unavailable"] for name, result in results.items() if "unavailable" in result}
        assert CUDA_RIVALS <= set(unavailable) <= CUDA_RIVALS | OURS and "ds_moe (default)" not in unavailable
        assert all(f"not run: {name}: {reason}" in printed for name, reason in unavailable.items())
        assert all("need CUDA" in results[f"ds_moe {backend}"]["unavailable"] for backend in ("megablocks", "liger"))
        for name in set(results) - set(unavailable) - {bench_layer.GEMM}:
            result = results[name]
            assert 0 < result["min_s"] <= result["median_s"] <= result["max_s"]
            assert result["saved_bytes"] > 0 and result["peak_bytes"] is None and result["of_gemm"] > 0
            pairs, taken = result["time_to_default"], results["ds_moe (default)"]["seconds"]
            assert pairs["each"] == [theirs / ours for theirs, ours in zip(result["seconds"], taken, strict=False)]
            assert pairs["min"] <= pairs["median"] <= pairs["max"]
        assert results[bench_layer.RIVAL]["speed_to_rival"] == results[bench_layer.ROOFLINE]["speed_to_roofline"] == 1


def test_a_wrong_contender_is_not_timed(monkeypatch, tmp_path, capsys):
    right = bench_layer.contenders()

    def scaled(case):
        block = right["ds_moe reference"](case)
        return block._replace(run=lambda x: block.run(x) * 1.001)

    monkeypatch.setattr(bench_layer, "contenders", lambda: right | {"ds_moe reference": scaled})
    status, report = bench(tmp_path, "--routing", "zipf")
    known = {result["contender"] for result in report["results"] if {"median_s", "unavailable"} & set(result)}
    assert status == 1 and known == ({bench_layer.GEMM, bench_layer.ROOFLINE} | OURS | RIVALS | CUDA_RIVALS) - {
        "ds_moe reference"
    }
    assert "ds_moe reference" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("no kernel\nimage"), "failed: RuntimeError: no kernel"),
        (torch.OutOfMemoryError(), "out of memory"),
    ],
)
def test_a_rival_that_fails_is_listed_and_ours_is_not_excused(monkeypatch, tmp_path, error, reason):
    right = bench_layer.contenders()

    def fails(case):
        raise error

    monkeypatch.setattr(bench_layer, "contenders", lambda: right | {"DeepSpeed MoE": fails})
    status, report = bench(tmp_path, "--routing", "uniform")
    listed = {result["contender"]: result.get("unavailable") for result in report["results"]}
    assert status == 0 and listed["DeepSpeed MoE"] == reason
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
        monkeypatch.setattr(bench_layer, "contenders", lambda: right | {"ds_moe reference": fails})
        with pytest.raises(RuntimeError, match="no kernel"):
            bench(tmp_path, "--routing", "uniform")


def test_a_padding_that_does_not_fit_is_not_tried(monkeypatch):
    suite = layer_block.SUITES["smoke"]
    shape = suite.shapes["tiny"]
    case = layer_block.Case(shape, layer_block.draw_weights(shape, suite), fullest=shape.T)
    monkeypatch.setattr(layer_contenders, "free_bytes", lambda device: 1000)
    with pytest.raises(layer_block.Unavailable, match="padding to 256 rows"):
        layer_contenders.deepspeed_moe(case)


def small_h100(monkeypatch, device):
    shapes = {"small": bench_layer.SUITES["h100"].shapes["olmoe"]._replace(T=128, D=128, F=96, E=16)}
    monkeypatch.setitem(bench_layer.SUITES, "h100", bench_layer.SUITES["h100"]._replace(device=device, shapes=shapes))


@pytest.mark.slow
def test_the_gpu_suite_agrees_in_bfloat16_on_a_cpu(monkeypatch, tmp_path):
    small_h100(monkeypatch, "cpu")
    status, report = bench(tmp_path, "--suite", "h100", "--routing", "zipf")
    assert status == 0 and report["environment"]["dtype"] == "torch.bfloat16"
    assert {result["contender"] for result in report["results"] if "median_s" in result} >= RIVALS


@pytest.mark.gpu
def test_the_gpu_suite_agrees_on_a_gpu(monkeypatch, tmp_path):
    small_h100(monkeypatch, "cuda")
    status, report = bench(tmp_path, "--suite", "h100")
    assert status == 0
    for result in report["results"]:
        excused = {bench_layer.GEMM, "ds_moe megablocks", "ds_moe liger"} | CUDA_RIVALS
        assert result["contender"] in excused or (result.get("peak_bytes") or 0) > 0, result


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_suite_needs_a_gpu(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_layer.main(["--suite", "h100"])
    assert stopped.value.code == 2 and "--suite h100 needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_router_sends_tokens_where_the_routing_says(routing):
    suite = layer_block.SUITES["cpu"]
    shape = suite.shapes["A"]._replace(F=64)
    weights = layer_block.draw_weights(shape, suite)
    x = layer_block.routed_input(shape, weights.router_ED, routing)
    logits_TE = (x[0] @ weights.router_ED.T).sort(dim=1).values
    assert logits_TE[:, -shape.K :].min() > 0.99 and logits_TE[:, : -shape.K].max() < -0.99
    layer = layer_contenders.ds_moe(layer_block.Case(shape, weights, shape.T)).run
    layer(x)
    counts = layer.load.take().counts_E
    assert counts.sum() == shape.T * shape.K
    assert bench_layer.rows_of_fullest(x, weights.router_ED, shape.K) == counts.max()
    if routing == "one_hot":
        assert counts.tolist() == [shape.T] * shape.K + [0] * (shape.E - shape.K)
    elif routing == "zipf":
        assert counts.tolist() == sorted(counts.tolist(), reverse=True) and counts[0] > 3 * counts[-1]
    else:
        assert counts.max() < 1.3 * counts.min()


class KeepsByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = {"wide": [x.new_zeros(100, 8)]}
        ctx.save_for_backward(x.new_zeros(50, 8)[:1])  # a view keeps all of its storage
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0]


@pytest.mark.parametrize(
    ("run", "floats"),
    [
        (lambda x, w: x * w, 0),  # the input and a parameter
        (lambda x, w: x.exp() * w, 16 * 8),  # both keep the result of exp
        (lambda x, w: (x * w).sin().cos(), 2 * 16 * 8),
        (lambda x, w: [(x * w).sin(), x + w][1], 0),  # what nobody waits for is gone
        (lambda x, w: KeepsByHand.apply(x) + w, 100 * 8 + 50 * 8),
    ],
)
def test_saved_bytes(run, floats):
    x, w = torch.randn(16, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    block = layer_block.Block(lambda x: run(x, w), [w])
    assert layer_measure.saved_bytes(block, x) == 4 * floats


def test_slow_contenders_sit_out_rounds(monkeypatch):
    monkeypatch.setattr(layer_measure, "forward_backward", lambda block, x: block)
    monkeypatch.setattr(layer_measure, "seconds", lambda run, device: run())
    runs = {"roofline": (0.1, None), "quick": (1.0, None), "slow": (9.0, None), "fair": (8.0, None)}
    times = layer_measure.interleaved(runs, "cpu", 6, apart=["roofline"])
    assert times == {"roofline": [0.1] * 6, "quick": [1.0] * 6, "slow": [9.0] * 2, "fair": [8.0] * 6}


def test_slope_is_the_exponent_of_a_power_law():
    sizes = [1, 2, 4, 8]
    assert layer_growth.slope(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert layer_growth.slope(sizes, [7, 7, 7, 7]) == pytest.approx(0)


def test_growth_is_measured_and_drawn(tmp_path, capsys):
    file = tmp_path / "figures/growth.png"
    status, report = bench(tmp_path, "--growth", "--plot", str(file))
    assert status == 0 and "slope" in capsys.readouterr().out
    sweeps = report["growth"]["axes"]
    assert sweeps["T"]["sizes"] == [32, 64, 128] and set(sweeps) == {"T", "E", "K"}
    for sweep in sweeps.values():
        counts = [len(one["contenders"][bench_layer.DEFAULT]["seconds"]) for one in sweep["points"]]
        # Two repetitions; one where a busy machine has made it 8 times slower than the rival.
        assert len(counts) == len(sweep["sizes"]) and set(counts) <= {1, 2}
        assert all(one["weight_traffic_s"] > 0 for one in sweep["points"])
    saved = {name: slopes["saved_bytes"] for name, slopes in sweeps["T"]["slopes"].items()}
    assert saved == pytest.approx({bench_layer.DEFAULT: 1, bench_layer.RIVAL: 1}, abs=0.05)
    with Image.open(file) as picture:
        assert picture.size[0] > picture.size[1] > 500


def test_growth_stops_where_a_contender_is_wrong(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(layer_growth, "difference", lambda found, expected: float("nan"))
    monkeypatch.setattr(layer_growth, "memory_bandwidth", lambda device: 1e10)
    status, report = bench(tmp_path, "--growth")
    assert status == 1 and "growth" not in report and "differs from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("choice", "given", "wanted"),
    [
        ("launcher", {}, {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**35)}),
        (
            "launcher",
            {"MALLOC_MMAP_THRESHOLD_": "7"},
            {"MALLOC_MMAP_THRESHOLD_": "7", "MALLOC_TRIM_THRESHOLD_": "3435"},
        ),
        ("launcher", {"MALLOC_MMAP_THRESHOLD_": "7", "MALLOC_TRIM_THRESHOLD_": "8"}, None),
        ("default", {"MALLOC_TRIM_THRESHOLD_": "8"}, {}),
        ("default", {}, None),
    ],
)
def test_it_starts_again_under_the_allocator_of_choice(monkeypatch, choice, given, wanted):
    started = []
    monkeypatch.setattr(os, "execve", lambda program, words, environment: started.append((words, environment)))
    for name in bench_layer.MALLOC:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    bench_layer.settle_malloc(choice)
    if wanted is None:
        assert not started
        return
    [(words, environment)] = started
    found = {name: environment[name] for name in bench_layer.MALLOC if name in environment}
    assert found.keys() == wanted.keys() and all(found[name].startswith(value) for name, value in wanted.items())
    assert words[0] == sys.executable and words[1:] == sys.orig_argv[1:]
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "smoke", "--shape", "Z"], "--shape Z: suite smoke has tiny"),
        (["--suite", "smoke", "--growth", "--routing", "zipf"], "leave out --shape and --routing"),
        (["--suite", "smoke", "--plot", "a.png"], "--plot draws what --growth measures"),
        (["--suite", "smoke", "--repeats", "0"], "must be at least 1"),
    ],
)
def test_bad_options(capsys, words, message):
    with pytest.raises(SystemExit):
        bench_layer.parse(words)
    assert message in capsys.readouterr().err
