"""The step model's command: its options, what it refuses, this machine measured, a benchmark checked."""

import functools
import json
from dataclasses import replace

import pytest
from PIL import Image

from ds_moe.errors import UserError
from tests.step_model.test_step_time import BIG, MEASURED, topology
from tools.bench.step import bench as bench_step
from tools.step_model import calibrate, machines, shapes
from tools.step_model import command as script
from tools.step_model import step_time as steps


def run(capsys, *words):
    """Exit status, standard output and standard error."""
    status = script.main([str(word) for word in words])
    return status, *capsys.readouterr()


def test_one_topology(capsys, tmp_path):
    file = tmp_path / "estimate.json"
    status, out, err = run(capsys, "--ep-size", 8, "--checkpointing", "--json", file)
    assert status == 0 and not err
    assert all(word in out for word in ("estimated", "all-to-all of rows", "experts", "full overlap", "MFU", "GiB"))
    report = json.loads(file.read_text())
    assert report["machine"]["inter"] == {"bandwidth": 40e9, "latency_s": 15e-6}
    assert report["estimated"]["step_s"] >= report["estimated"]["step_overlap_s"] > 0


def test_sweep_and_plot(capsys, tmp_path):
    words = (
        "--sweep",
        "--checkpointing",
        "--tokens",
        32768,
        "--devices",
        8,
        1024,
        "--plot",
        tmp_path / "a.png",
        "--json",
        tmp_path / "a.json",
    )
    status, out, _ = run(capsys, *words)
    assert status == 0 and "estimated" in out and "none fits" in out and "1024" in out
    assert Image.open(tmp_path / "a.png").size[0] > 800
    assert len(json.loads((tmp_path / "a.json").read_text())["sweep"]["1024"]) == 8


@pytest.mark.parametrize(
    "words, complaint",
    [
        (("--ep-size", 3), "--ep-size 3 does not divide the 128 experts"),
        (("--ep-size", 16), "--ep-size 16 does not divide the 8 ranks"),
        (("--tokens", 0), "--tokens 0: must be at least 1"),
        (("--tokens", 64, "--sequence", 65), "--sequence 65 exceeds the 64 --tokens"),
        (("--max-vio", -1), "--max-vio"),
        (("--model", "qwen"), "neither one of qwen3-vl-30b-a3b"),
        (("--machine", "cpu"), "--calibrate FILE.json"),
        (("--machine", "tpu"), "neither one of h100-8x"),
        (("--plot", "a.png"), "add --sweep"),
        (("--sweep", "--devices", 12), "--devices 12"),
    ],
)
def test_mistakes_are_one_line(capsys, words, complaint):
    status, _, err = run(capsys, *words)
    assert status == 2 and complaint in err and err.count("\n") == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"num_experts": 4}', '{"num_hidden_layers": 4}'])
def test_a_file_that_is_no_config_is_named(capsys, tmp_path, text):
    file = tmp_path / "config.json"
    file.write_text(text)
    status, _, err = run(capsys, "--model", file)
    assert status == 2 and str(file) in err
    assert run(capsys, "--machine", file)[0] == 2


def test_figures_of_a_machine_are_read_as_written(tmp_path):
    machine = replace(MEASURED, collectives={"all_gather": machines.Link(1.0, 2.0)})
    machines.write_machine(machine, tmp_path / "cpu.json")
    assert machines.read_machine(str(tmp_path / "cpu.json")) == machine
    assert machine.link("all_gather") == machines.Link(1.0, 2.0) and machine.link("all_to_all") == machine.intra
    with pytest.raises(UserError, match="figures for fp32 only"):
        steps.estimate(topology(dtype="bf16"), BIG, machine)


@pytest.mark.slow
def test_this_cpu_is_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "calibrate", functools.partial(calibrate.calibrate, repeats=1))
    file = tmp_path / "cpu.json"
    status, out, _ = run(capsys, "--calibrate", file)
    assert status == 0 and "measured" in out
    machine = machines.read_machine(str(file))
    assert machine.peak_flops["fp32"] > 0 and set(machine.collectives) == set(machines.COLLECTIVES)
    status, out, _ = run(capsys, "--machine", file, "--model", "tiny-64", "--ep-size", 2, "--tokens", 1024)
    assert status == 0 and "estimated" in out and "measured: 2 processes" in out


# --- check


def bench_file(folder, **changes):
    """A report as the step's benchmark writes it, in which ds_moe took exactly twice its estimated time."""
    alike = {"nodes": 1, "devices_per_node": 2, "tokens": 1024, "sequence": 256, "dtype": "fp32"}
    tiny = shapes.PRESETS["tiny-64"]
    twice = 2 * steps.estimate(topology(**alike, ep_size=2, checkpointing=False), tiny, MEASURED).step_s
    alike = {"tokens": 1024, "processes": 2, "sent_bytes": 2**20}
    rows = [
        {"contender": "ds_moe", "median_s": twice, "peak_bytes": 2**30, **alike},
        {"contender": "zero3", "median_s": 1.0, **alike},
        {"contender": "autoep", **alike},  # wrong, not timed
    ]
    report = {"model": bench_step.SMALL, "sequence": 256, "environment": {"dtype": "fp32"}, "results": rows}
    file = folder / "bench.json"
    file.write_text(json.dumps({key: value for key, value in (report | changes).items() if value is not None}))
    return file


def test_the_preset_is_the_benchmark_s_model():
    tiny = shapes.PRESETS["tiny-64"]
    assert shapes.from_config(bench_step.SMALL, tiny.name) == tiny
    assert shapes.parameters(tiny) == pytest.approx(77e6, rel=0.01)


def test_check_compares_ds_moe_and_its_rival(capsys, tmp_path):
    machines.write_machine(MEASURED, tmp_path / "cpu.json")
    report = tmp_path / "check.json"
    words = ("--machine", tmp_path / "cpu.json", "--check", bench_file(tmp_path), "--json", report)
    status, out, _ = run(capsys, *words)
    assert status == 0 and "measured" in out and "estimated" in out and "-50%" in out
    ours, rival = json.loads(report.read_text())["check"]
    assert ours["estimated_s"] == pytest.approx(ours["measured_s"] / 2)
    assert (ours["ep_size"], rival["ep_size"]) == (2, 1)  # all experts gathered, nothing exchanged
    rows, layers = 1024 * 2, 4
    sent = layers * (64 * 8 + 2 * rows * (2 * 256 * 4 + 4)) / 2  # counts; forward and backward, half stays
    assert ours["estimated_sent_bytes"] == sent and rival["estimated_sent_bytes"] == 0


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"results": None}, "no results; give what tools.bench.step.bench --json wrote"),
        ({"results": [{"tokens": 8}]}, "no contender"),
        ({"results": [{"contender": "ds_moe", "median_s": 1.0, "tokens": 8}]}, "no processes"),
        ({"results": [{"contender": "ds_moe", "median_s": 1.0, "tokens": 256, "processes": 16}]}, "--processes 16"),
        ({"model": None}, "no model"),
        ({"model": {"num_experts": 4}}, "no num_hidden_layers"),
        ({"environment": {}}, "no dtype"),
    ],
)
def test_results_of_another_form_are_refused(capsys, tmp_path, changes, complaint):
    machines.write_machine(MEASURED, tmp_path / "cpu.json")
    status, _, err = run(capsys, "--machine", tmp_path / "cpu.json", "--check", bench_file(tmp_path, **changes))
    assert status == 2 and complaint in err and err.count("\n") == 1
