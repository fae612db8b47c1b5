"""The gate's benchmark measures every contender, judges by the figures it writes, and times nothing that is wrong."""

import json

import pytest
import torch

from tools.bench.gate import bench as bench_gate


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The JSON's contents of a tiny benchmark in this process, whose allocator and threads stay as they are."""
    monkeypatch.setattr(bench_gate, "reuse_memory", lambda: True)
    threads = torch.get_num_threads()

    def run() -> dict:
        assert bench_gate.main(["--suite", "smoke", "--json", str(tmp_path / "new/gate.json")]) == 0
        return json.loads((tmp_path / "new/gate.json").read_text())

    yield run
    torch.set_num_threads(threads)


def test_every_figure_is_there(bench, capsys):
    report, suite = bench(), bench_gate.SUITES["smoke"]
    printed = capsys.readouterr().out
    wanted = [("layer", K) for K in suite.layer_K] + [("model", K) for K in suite.model_K]
    assert [(case["case"], case["K"]) for case in report["cases"]] == 2 * wanted
    assert {case["memory"] for case in report["cases"]} == {"default", "reused"}
    for case in report["cases"]:
        results, rival = case["results"], bench_gate.RIVALS[case["case"]]
        assert list(results)[:3] == ["base", "ds_moe bank", rival] and case["difference"] <= bench_gate.TOLERANCE
        for result in results.values():
            assert result["median_s"] > 0
            assert result["overhead_min_s"] <= result["overhead_s"] <= result["overhead_max_s"]
        ours, theirs = results["ds_moe bank"], results[rival]
        assert results["base"]["overhead_s"] == 0
        assert case["ratios"]["overhead"] == pytest.approx(ours["overhead_s"] / theirs["overhead_s"])
        assert case["ratios"]["saved"] == pytest.approx(ours["saved_bytes"] / theirs["saved_bytes"])
    assert len(report["claims"]) == 2 * (2 * len(suite.layer_K) + len(suite.model_K))
    assert printed.count("NOT MET") == sum(not claim["holds"] for claim in report["claims"])
    assert report["versions"].keys() == {"torch", "transformers", "peft"} and report["device"].startswith("cpu")


def test_saved_bytes_of_a_layer():
    suite, K = bench_gate.SUITES["smoke"], 3
    contenders = bench_gate.layer_contenders(K, suite)
    saved = {name: bench_gate.saved_bytes(contender) for name, contender in contenders.items()}
    tokens, R = suite.batch * suite.layer_S, K * suite.rank
    assert saved["base"] == 0
    assert saved["ds_moe bank"] == 4 * (tokens * R + suite.batch * R + R) + 8 * R  # A x, g * scale; scale, owner
    assert saved["loop-and-stack"] == 4 * (K * tokens * suite.layer_D + suite.batch * K)  # the stack, g


def test_what_computes_something_else_is_not_timed():
    contenders = bench_gate.layer_contenders(2, bench_gate.SUITES["smoke"])
    right = contenders["ds_moe bank"]
    contenders["ds_moe bank"] = right._replace(run=lambda: tuple(1.001 * result for result in right.run()))
    with pytest.raises(SystemExit, match="ds_moe bank and loop-and-stack differ by 1e-03; nothing is timed"):
        bench_gate.measure("layer", 2, contenders, rounds=1)
