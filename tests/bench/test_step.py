"""The step's benchmark: its ranks find every contender right, time and weigh it; what it prints and returns follows."""

import json
import math

import pytest
import torch

from tools.bench.step import bench as bench_step
from tools.bench.step import ranks as step_ranks

SUITE = bench_step.SUITES["smoke"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What 2 ranks find of all contenders, in one launch."""
    options = bench_step.parse(["--suite", "smoke", "--repeats", "2", "--steps", "2"])
    folder = tmp_path_factory.mktemp("bench_step")
    return bench_step.launch(["time", "memory"], list(bench_step.CONTENDERS), 2, options, folder)


@pytest.mark.slow
def test_all_contenders_compute_the_same_and_are_timed(measured):
    timed = [result for result in measured["results"] if "loss" in result]
    assert [(result["tokens"], result["contender"]) for result in timed] == [
        (tokens, contender) for tokens in SUITE.tokens for contender in bench_step.CONTENDERS
    ]
    for result in timed:
        assert result["loss_difference"] <= 1e-5 and result["norm_difference"] <= 1e-4
        assert result["loss"] == pytest.approx(4.6, abs=0.3)  # ln of a vocabulary of 100
        assert len(result["step_s"]) == 4 and min(result["step_s"]) > 0
        assert (result["sent_bytes"] > 0) == (result["contender"] != "zero3")
    assert measured["environment"]["threads"] == 1 and measured["environment"]["backend"] == "gloo"
    assert measured["environment"].keys() >= {"torch", "deepspeed", "transformers", "malloc"}
    assert 40_000 < measured["parameters"] < 60_000


@pytest.mark.slow
def test_about_half_of_what_is_handed_over_is_sent_to_the_other_rank(measured):
    """fp32 rows there and back, forward and backward; ours sends counts and combine weights beside them."""
    sent = [r for r in measured["results"] if r["contender"] != "zero3" and "sent_bytes" in r]
    assert len(sent) == 2 * len(SUITE.tokens)
    for result in sent:
        rows = result["tokens"] * SUITE.model["num_experts_per_tok"]
        handed_over = SUITE.model["num_hidden_layers"] * 4 * rows * SUITE.model["hidden_size"] * 4
        assert 0.4 < result["sent_bytes"] / handed_over < (0.7 if result["contender"] == "autoep" else 0.75)


@pytest.mark.slow
def test_memory_rises_from_imports_to_the_peak_of_a_step(measured):
    weighed = [result for result in measured["results"] if "peak_bytes" in result]
    assert len(weighed) == len(SUITE.tokens) * len(bench_step.CONTENDERS)
    for result in weighed:
        assert 100e6 < result["built_bytes"] <= result["peak_bytes"] < 4e9
        assert 100e6 < result["imported_bytes"] < result["peak_bytes"]


@pytest.mark.slow
def test_the_real_figures_are_printed_and_written(measured, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_step, "measure", lambda options, folder: [measured])
    file = tmp_path / "new/step.json"
    assert bench_step.main(["--suite", "smoke", "--json", str(file)]) == 0
    printed, written = capsys.readouterr().out, json.loads(file.read_text())
    assert all(printed.count(name) >= 2 * len(SUITE.tokens) for name in bench_step.CONTENDERS.values())
    assert len(written["results"]) == len(SUITE.tokens) * len(bench_step.CONTENDERS)
    assert written["model"] == SUITE.model and written["environment"]["device"] == "cpu"
    for result in written["results"]:
        assert result["tokens_per_s"] == pytest.approx(2 * result["tokens"] / result["median_s"])
        assert ("speed_of_ds_moe" in result) == (result["contender"] != "ds_moe") == ("memory_of_ds_moe" in result)


def figures(contender: str, processes: int = 2, step_s: tuple[float, ...] = (), **more) -> dict:
    timed = {"step_s": list(step_s)} if step_s else {}
    checked = {"loss": 4.6, "loss_difference": 0.0, "norm_difference": 0.0, "sent_bytes": 0}
    return {"tokens": 32, "contender": contender, "processes": processes, **checked, **timed, **more}


def test_speeds_are_ratios_of_medians_and_memory_of_peaks():
    times = [figures("ds_moe", step_s=(1.0, 2.0, 9.0)), figures("autoep", step_s=(3.0, 3.0, 4.0))]
    peaks = {"ds_moe": 300, "autoep": 400}
    sizes = [{"tokens": 32, "processes": 2, "contender": name, "peak_bytes": size} for name, size in peaks.items()]
    ours, theirs = bench_step.summarize(times + sizes)
    assert (ours["median_s"], ours["min_s"], ours["max_s"], ours["tokens_per_s"]) == (2.0, 1.0, 9.0, 32.0)
    assert theirs["speed_of_ds_moe"] == 1.5 and theirs["memory_of_ds_moe"] == 0.75


def test_scaling_starts_more_and_more_processes_and_compares_with_one(monkeypatch, capsys):
    launched = []

    def launch(what, contenders, processes, options, folder):
        launched.append((what, contenders, processes))
        found = figures("ds_moe", processes, step_s=(1.0, 1.25)[processes - 1 : processes])
        return {"environment": {}, "parameters": 1, "results": [found]}

    monkeypatch.setattr(bench_step, "launch", launch)
    monkeypatch.setattr(bench_step.os, "sched_getaffinity", lambda _: {0})
    assert bench_step.main(["--suite", "smoke", "--scaling", "--tokens", "32"]) == 0
    assert launched == [(["time"], ["ds_moe"], 1), (["time"], ["ds_moe"], 2)]
    printed = capsys.readouterr().out
    assert "0.80" in printed and "2 processes of one thread each share 1 cores" in printed


def test_a_wrong_contender_is_neither_timed_nor_weighed(monkeypatch, capsys):
    launched = []

    def launch(what, contenders, processes, options, folder):
        launched.append((what, contenders))
        results = [figures("ds_moe", step_s=(1.0,)), figures("zero3", step_s=(2.0,)), figures("autoep")]
        if what == ["memory"]:
            sizes = {"peak_bytes": 3, "built_bytes": 2, "imported_bytes": 1}
            results = [{"tokens": 32, "contender": contenders[0], "processes": 2, **sizes}]
        return {"environment": {}, "parameters": 1, "results": results}

    monkeypatch.setattr(bench_step, "launch", launch)
    assert bench_step.main(["--suite", "smoke", "--tokens", "32"]) == 1
    assert launched == [(["time"], ["ds_moe", "zero3", "autoep"]), (["memory"], ["ds_moe"]), (["memory"], ["zero3"])]
    printed = capsys.readouterr()
    assert printed.out.count("wrong, not timed") == 1
    assert "not those of plain transformers: ['autoep']" in printed.err


@pytest.mark.parametrize(
    ("loss", "norm", "right"), [(1e-6, 1e-5, True), (2e-5, 0.0, False), (0.0, 1e-3, False), (math.nan, 0.0, False)]
)
def test_loss_and_gradients_must_both_be_right(loss, norm, right):
    plan = {"loss_tolerance": SUITE.loss_tolerance, "norm_tolerance": SUITE.norm_tolerance}
    assert step_ranks.is_right({"loss_difference": loss, "norm_difference": norm}, plan) is right


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--suite", "cpu", "--tokens", "100"], "--tokens must be a multiple of 256"),
        (["--scaling", "--contender", "zero3"], "leave out --contender"),
        (["--repeats", "0"], "at least 1"),
        (["--suite", "h100"], "--suite h100 needs 8 CUDA devices, and there are 0"),
    ],
)
def test_options_that_cannot_work(arguments, complaint, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit):
        bench_step.parse(arguments)
    assert complaint in capsys.readouterr().err


def test_no_expert_is_square():
    for suite in bench_step.SUITES.values():
        assert suite.model["hidden_size"] != 2 * suite.model["moe_intermediate_size"]


@pytest.mark.parametrize(("suite", "millions"), [("cpu", 77), ("cpu-39m", 39)])
def test_the_cpu_models_have_the_size_that_the_docs_say(suite, millions):
    plan = {"dtype": "fp32", "model": bench_step.SUITES[suite].model}
    assert step_ranks.build_model(plan, torch.device("meta")).num_parameters() == pytest.approx(
        millions * 1e6, rel=0.01
    )
