"""tools/bench_layer.py times every contender, and none that computes something else."""

import json
import subprocess
import sys

import pytest

from ds_moe.moe.backends import BACKENDS, reference
from tools import bench_layer

CONTENDERS = {bench_layer.ROOFLINE, bench_layer.EAGER, bench_layer.RIVAL, *(f"ds_moe {name}" for name in BACKENDS)}


def bench(monkeypatch, folder, *arguments):
    """Exit status and the JSON's contents of a small benchmark in this process."""
    file = folder / "bench.json"
    words = ["--suite", "smoke", "--repeats", "2", "--threads", "1", "--json", str(file), *arguments]
    monkeypatch.setattr(sys, "argv", ["bench_layer.py", *words])
    return bench_layer.main(), json.loads(file.read_text())


def test_help():
    done = subprocess.run([sys.executable, "tools/bench_layer.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(option in done.stdout for option in ("--suite", "--shape", "--routing", "--repeats", "--json"))


def test_every_contender_is_timed_at_every_routing(monkeypatch, tmp_path):
    status, report = bench(monkeypatch, tmp_path)
    assert status == 0
    assert report["environment"]["threads"] == 1 and report["shapes"]["tiny"]["E"] == 4
    for routing in bench_layer.ROUTINGS:
        results = {result["contender"]: result for result in report["results"] if result["routing"] == routing}
        assert set(results) == CONTENDERS
        for result in results.values():
            assert 0 < result["min_s"] <= result["median_s"] <= result["max_s"]
        assert results[bench_layer.RIVAL]["speed_to_rival"] == results[bench_layer.ROOFLINE]["speed_to_roofline"] == 1


def test_a_wrong_contender_is_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(BACKENDS, "reference", lambda rows, weight, counts: reference(rows, weight, counts) * 1.001)
    status, report = bench(monkeypatch, tmp_path, "--routing", "zipf")
    timed = {result["contender"] for result in report["results"] if "median_s" in result}
    assert status == 1 and timed == CONTENDERS - {"ds_moe reference"}
    assert "ds_moe reference" in capsys.readouterr().err


@pytest.mark.parametrize("routing", bench_layer.ROUTINGS)
def test_the_router_sends_tokens_where_the_routing_says(routing):
    suite = bench_layer.SUITES["cpu"]
    shape = suite.shapes["A"]
    block = bench_layer.moe_block(shape, suite, "eager", "reference")
    block(bench_layer.routed_input(shape, block.gate.weight, routing))
    counts = block.load.take().counts_E
    assert counts.sum() == shape.T * shape.K
    if routing == "one_hot":
        assert counts.tolist() == [shape.T] * shape.K + [0] * (shape.E - shape.K)
    elif routing == "zipf":
        assert counts.tolist() == sorted(counts.tolist(), reverse=True) and counts[0] > 3 * counts[-1]
    else:
        assert counts.max() < 1.3 * counts.min()
