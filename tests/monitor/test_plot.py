"""`ds-moe plot`: what is in the event files is in the picture, and what is no run is one clear line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ds_moe import cli
from ds_moe.monitor.board import LOAD_TAG
from ds_moe.monitor.meters import routing_scalars, window_scalars
from ds_moe.monitor.plot import COLORS, PANELS, draw, read_run, running_mean
from ds_moe.monitor.reports import RoutingReport, StepReport

COUNTS = np.array([[[6, 2, 4], [4, 4, 4]], [[1, 1, 1], [2, 0, 1]]])  # all and image tokens of 2 layers x 3 experts
CURVES = {
    "train/loss": [(1, 3.0), (2, 2.0), (3, 1.5)],
    "eval/loss": [(3, 1.75)],
    "train/lr": [(1, 1e-5), (3, 5e-6)],
    "moe/max_vio": [(1, 0.5), (3, 0.25)],
    "moe/max_vio_image": [(3, 0.75)],
    "perf/tokens_per_s": [(3, 12_345.0)],
    "eval/accuracy": [(3, 0.5)],
    "eval/accuracy_two_digits": [(3, 0.25)],
}


def write_run(folder, curves=CURVES, counts=None):
    writer = SummaryWriter(str(folder / "tensorboard"))
    for tag, curve in curves.items():
        for step, value in curve:
            writer.add_scalar(tag, value, step)
    if counts is not None:
        writer.add_tensor(LOAD_TAG, torch.from_numpy(counts), 3)
    writer.close()
    return folder


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def lines(figure, title):
    """(label, points, color) of every line of the panel with that title."""
    axes = next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))
    return [(line.get_label(), line.get_xydata().tolist(), line.get_color()) for line in axes.get_lines()]


def test_a_run_has_a_panel_for_each_group_of_its_curves_and_the_load_of_its_experts(tmp_path):
    figure = draw([read_run(write_run(tmp_path / "run", counts=COUNTS))])
    panels = ["Loss", "Held-out answers", "Balance", "Learning rate", "Tokens per second"]
    loads = ["all tokens", "text tokens", "image tokens", ""]  # and the scale
    assert [title.startswith(start) for title, start in zip(titles(figure), panels + loads, strict=True)] == [True] * 9
    assert [label for label, *_ in lines(figure, "Loss")] == ["training  1.5", "held-out  1.75"]
    assert lines(figure, "Loss")[0][1] == [[1, 3], [2, 2], [3, 1.5]]
    assert [label for label, *_ in lines(figure, "Held-out")] == ["two digits  25.0%", "mean  50.0%"]
    assert [label for label, *_ in lines(figure, "Balance")] == ["all tokens  0.25", "image tokens  0.75"]
    speed = next(axes for axes in figure.axes if axes.get_title(loc="left").startswith("Tokens"))
    assert speed.get_title(loc="right") == "12,345"
    assert "MaxVio 0.25" in figure.axes[5].get_title(loc="right")  # layers of 6, 2, 4 and 4, 4, 4


def test_runs_are_told_apart_by_color_and_have_no_details(tmp_path):
    shorter = {"train/loss": [(1, 4.0), (2, 3.0)], "train/grad_norm": [(2, 1.0)]}
    runs = [write_run(tmp_path / "a", counts=COUNTS), write_run(tmp_path / "b", shorter)]
    figure = draw([read_run(run) for run in runs])
    assert len(figure.axes) == 6 and "Gradient norm" in titles(figure)
    drawn = [(points, color) for _, points, color in lines(figure, "Loss") if points]
    first, held_out, second = drawn
    assert (first[1], held_out[1], second[1]) == (COLORS[0], COLORS[0], COLORS[1])
    assert second[0] == [[1, 4], [2, 3]] and held_out[0] == [[3, 1.75]]
    assert len([1 for _, points, _ in lines(figure, "Balance") if points]) == 1  # image tokens are a detail
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [str(run) for run in runs]


@pytest.mark.parametrize("names", [["$\\frac$"], ["a$x$", "b$\\frac$"]])
def test_names_are_no_formulas(names, tmp_path, monkeypatch, capsys):
    """Neither of runs nor of kinds: matplotlib takes what stands between two $ for one, and raises for a wrong one."""
    monkeypatch.chdir(tmp_path)
    for name in names:
        write_run(tmp_path / name, CURVES | {"eval/accuracy_$\\bad$": [(3, 0.5)]})
    assert cli.main(["plot", *names, "--out", "all.svg"]) == 0
    assert not capsys.readouterr().err and (tmp_path / "all.svg").stat().st_size > 1000


def test_the_running_mean_takes_what_is_there():
    nan = float("nan")
    np.testing.assert_allclose(running_mean(np.array([1.0, 2, 6, nan]), 1), [1.5, 3, 4, 6])
    assert np.isnan(running_mean(np.array([nan, nan, nan, 2.0]), 1)[:2]).all()


def test_every_tag_that_is_drawn_is_one_that_the_monitor_writes():
    step = StepReport(step=1, loss=1.0, lr=0.1, grad_norm=1.0, tokens=8, samples=2, step_s=1.0, data_wait_s=0.0)
    routing = RoutingReport(np.array([[4, 4]]), np.array([[1, 2]]), 0.5, aux_loss=None)
    written = set(window_scalars([step], 1.0)) | set(routing_scalars(routing))
    tags = {tag for panel in PANELS for tag in panel.tags | panel.details}
    assert {tag for tag in tags if tag.startswith(("train/", "perf/", "moe/"))} <= written


def test_the_picture_lies_in_the_run_and_says_when_it_replaces_one(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run")
    write_run(tmp_path / "other", {"train/loss": [(7, float("nan"))]})
    for replaced in ("", " (replaced)"):
        assert cli.main(["plot", str(run)]) == 0
        assert capsys.readouterr().out == f"{run}/plot.png{replaced}: {run} to step 3\n"
    assert Image.open(run / "plot.png").size[0] > 1500
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plot", "run", "other", "--json", "new/curves.json"]) == 0  # a loss of NaN is no reason to fail
    assert "plot.png: run to step 3, other to step 7" in capsys.readouterr().out
    curves = json.loads((tmp_path / "new/curves.json").read_text())
    assert curves["run"]["eval/accuracy"] == [[3, 0.5]] and (tmp_path / "plot.png").is_file()
    assert cli.main(["plot", str(run), "--out", str(tmp_path / "more/run.pdf")]) == 0
    assert (tmp_path / "more/run.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nowhere"], "nowhere: no such folder; give the train.output_dir of a run"),
        (["empty"], "empty: no TensorBoard event files below it; give the train.output_dir of a run"),
        (["."], ".: 2 runs lie below it; give one or more of a/tensorboard, b/tensorboard"),
        (
            ["a", "--out", "a.txt"],
            "--out a.txt: a picture ends in .png, .svg, .pdf",
        ),
        (["a", "--out", "taken/plot.png"], "cannot write taken: File exists"),
        (["b"], "b/tensorboard: event files without a curve; has the run finished its first step?"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(words, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", {})
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").touch()
    assert cli.main(["plot", *words]) == 2
    assert capsys.readouterr().err == f"error: {complaint}\n"


def test_what_only_is_called_like_events_is_one_line(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "events.out.tfevents.1").write_bytes(bytes(range(256)) * 8)
    assert cli.main(["plot", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {folder}: event files ") and said.count("\n") == 1
