"""The monitor's numbers, what it writes, what it prints, and what it costs."""

import io
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_moe.config.run import RunConfig
from ds_moe.monitor.board import LOAD_TAG
from ds_moe.monitor.gallery import sample_gallery
from ds_moe.monitor.heatmap import LoadHeatMap, coactivation, draw_coactivation
from ds_moe.monitor.meters import Clock, DeadExperts, max_vio, relative_load, routing_scalars, split_by_kind
from ds_moe.monitor.monitor import Monitor, RunMonitor, make_monitor
from ds_moe.monitor.progress import print_table
from ds_moe.monitor.reports import EvalReport, RoutingReport, ShownSample, StepReport

ROOT = Path(__file__).resolve().parents[2]
LAYERS, EXPERTS = 2, 8


def run_config(**monitor: object) -> RunConfig:
    return RunConfig.model_validate(
        {"model": {"preset": "tiny-vl-moe"}, "data": {"train": "digits"}, "deepspeed": "zero1.json", "monitor": monitor}
    )


def new_monitor(run_dir: Path, total_steps: int = 100, console: Console | None = None, **monitor: object) -> Monitor:
    return make_monitor(
        run_config(**monitor),
        rank=0,
        total_steps=total_steps,
        flops_per_token=1e6,
        peak_flops=1e10,
        run_dir=run_dir,
        console=console or Console(file=io.StringIO(), force_terminal=False),
    )


def step_report(step: int, loss: float | None = None) -> StepReport:
    return StepReport(step, 2.0 / step if loss is None else loss, 1e-3, 1.5, 1000, 16, 0.5, 0.1)


def routing_report(seed: int = 0, aux_loss: float | None = 0.02) -> RoutingReport:
    rng = np.random.default_rng(seed)
    image_LE = rng.integers(50, 500, (LAYERS, EXPERTS))
    return RoutingReport(image_LE + rng.integers(50, 500, (LAYERS, EXPERTS)), image_LE, 1.9, aux_loss)


def eval_report(step: int) -> EvalReport:
    shown = [
        ShownSample(Image.new("RGB", (16, 16), "navy"), "Which digit is this?", "4", "4"),
        ShownSample(None, "How much is $2 + 2$?", "4", "five"),
    ]
    return EvalReport(step, 0.3, {"digit": 0.9, "even or odd": 1.0, "mean": 0.95}, shown)


def train(monitor: Monitor, first: int, last: int, loss: float | None = None) -> None:
    for step in range(first, last + 1):
        monitor.step(step_report(step, loss), routing_report(step) if monitor.is_log_step(step) else None)


def wait_for_pictures(monitor: Monitor) -> None:
    assert isinstance(monitor, RunMonitor)
    while monitor._board.drawing:
        time.sleep(0.001)


def events(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0}).Reload()


def curve(run_dir: Path, tag: str) -> dict[int, float]:
    """Values by step; fails on a step that comes twice or out of order."""
    scalars = events(run_dir).Scalars(tag)
    steps = [scalar.step for scalar in scalars]
    assert steps == sorted(set(steps)), steps
    return {scalar.step: scalar.value for scalar in scalars}


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_max_vio_is_the_mean_over_layers_of_the_worst_excess():
    uniform, all_on_one = np.full(4, 10), np.array([40, 0, 0, 0])
    assert max_vio(np.stack([uniform, uniform])) == 0
    assert max_vio(np.stack([all_on_one])) == 3  # E - 1
    assert max_vio(np.stack([uniform, all_on_one])) == 1.5
    assert max_vio(np.stack([all_on_one, np.zeros(4, int)])) == 3  # a layer without tokens does not count
    assert np.isnan(max_vio(np.zeros((2, 4), int)))


def test_relative_load_marks_dead_experts_and_empty_layers():
    load_LE = relative_load(np.array([[4, 2, 2, 0], [0, 0, 0, 0]]))
    np.testing.assert_array_equal(load_LE[0], [2, 1, 1, 0])
    assert np.isnan(load_LE[1]).all()


def test_text_is_everything_that_is_no_image_token():
    counts = split_by_kind(np.array([[5, 3]]), np.array([[5, 0]]))
    np.testing.assert_array_equal(counts["text"], [[0, 3]])
    assert list(split_by_kind(np.array([[5, 3]]), np.zeros((1, 2), int))) == ["all"]


@pytest.mark.parametrize("image", [np.full((1, 2), 9), np.zeros((2, 2), int)])
def test_counts_that_cannot_belong_together_are_refused(image):
    with pytest.raises(ValueError, match="image_counts_LE"):
        RoutingReport(np.array([[5, 3]]), image, 1.0, None)


def test_an_expert_is_reported_once_when_it_was_dead_long_enough_and_again_when_it_dies_again():
    dead = DeadExperts(alarm_steps=10)
    alive_LE, idle_LE = np.array([[1, 2], [3, 4]]), np.array([[1, 0], [3, 4]])
    assert dead.newly_dead(idle_LE, 6) == []
    assert dead.newly_dead(idle_LE, 6) == [(0, 1)]
    assert dead.newly_dead(idle_LE, 6) == []
    assert dead.newly_dead(alive_LE, 6) == []
    assert dead.newly_dead(idle_LE, 12) == [(0, 1)]


def test_the_alarm_of_a_dead_expert_is_a_note(tmp_path):
    out = io.StringIO()
    monitor = new_monitor(tmp_path, console=Console(file=out), log_every=10, dead_alarm_steps=20, tensorboard=False)
    monitor.start(1, "summary", {})
    for step in (10, 20, 30):
        routing = RoutingReport(np.array([[5, 0, 3]]), np.zeros((1, 3), int), 1.0, None)
        monitor.step(step_report(step), routing)
    monitor.close()
    assert out.getvalue().count("step 20: no token for 20 steps: expert 1 of layer 0") == 1


def test_coactivation_is_the_share_of_a_row_experts_tokens():
    pairs_EE = np.array([[8, 2, 0], [2, 4, 2], [0, 2, 0]])
    expected = [[np.nan, 0.25, 0], [0.5, np.nan, 0.5], [np.nan] * 3]
    np.testing.assert_array_equal(coactivation(pairs_EE), expected)
    picture = draw_coactivation(pairs_EE, "caption")
    assert picture.dtype == np.uint8 and picture.shape == (440, 460, 3) and picture.std() > 0


def test_new_routing_scalars_have_their_values():
    report = RoutingReport(
        np.array([[6, 2], [4, 4]]),
        np.zeros((2, 2), int),
        1.0,
        None,
        last_step_LE=np.array([[1, 0], [1, 1]]),
        drop_rate=0.25,
        uncovered=0.125,
        bias_norm=0.5,
        kind_counts_LE={"even or odd": np.array([[3, 1], [2, 2]]), "absent": np.zeros((2, 2), int)},
    )
    scalars = routing_scalars(report)
    assert scalars["moe/max_vio_layer_0"] == 0.5 and scalars["moe/max_vio_layer_1"] == 0
    assert scalars["moe/max_vio_kind_even_or_odd"] == 0.25 and "moe/max_vio_kind_absent" not in scalars
    assert scalars["moe/max_vio"] == 0.25 and scalars["moe/max_vio_step"] == 0.5
    assert (scalars["moe/drop_rate"], scalars["moe/uncovered_tokens"], scalars["moe/bias_norm"]) == (0.25, 0.125, 0.5)


def test_time_left_counts_pauses_but_not_the_first_step():
    clock = Clock(total_steps=10)
    assert clock.seconds_left(1, now_s=100, step_s=30) == 9 * 30  # only the slow first step is known
    assert clock.seconds_left(3, now_s=104, step_s=1) == 7 * 2
    assert clock.seconds_left(10, now_s=200, step_s=1) == 0


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def test_every_scalar_is_written_with_its_value(tmp_path):
    monitor = new_monitor(tmp_path, log_every=10)
    monitor.start(1, "summary", {})
    train(monitor, 1, 20)
    monitor.evaluated(eval_report(20))
    monitor.close()
    tags = set(events(tmp_path).Tags()["scalars"])
    assert tags == {
        *(f"train/{name}" for name in ("loss", "lr", "grad_norm", "skipped_steps")),
        *(f"eval/{name}" for name in ("loss", "accuracy", "accuracy_digit", "accuracy_even_or_odd")),
        *(f"perf/{name}" for name in ("tokens_per_s", "step_s", "data_wait_frac", "mem_gib", "mfu")),
        *(
            f"moe/{name}"
            for name in (
                *("max_vio", "max_vio_text", "max_vio_image", "entropy", "dead_experts", "aux_loss"),
                *("max_vio_layer_0", "max_vio_layer_1", "drop_rate", "uncovered_tokens"),
            )
        ),
    }
    loss = curve(tmp_path, "train/loss")
    assert list(loss) == [1, 10, 20]
    assert loss[20] == pytest.approx(np.mean([2 / step for step in range(11, 21)]))  # the window's mean
    assert curve(tmp_path, "perf/tokens_per_s")[20] == pytest.approx(2000)
    assert curve(tmp_path, "perf/data_wait_frac")[20] == pytest.approx(0.2)
    assert curve(tmp_path, "perf/mfu")[20] == pytest.approx(2000 * 1e6 / 1e10)
    assert curve(tmp_path, "perf/mem_gib")[20] > 0.01
    assert curve(tmp_path, "moe/max_vio")[20] == pytest.approx(max_vio(routing_report(20).counts_LE))
    assert curve(tmp_path, "eval/accuracy") == {20: pytest.approx(0.95)}


def test_a_step_that_was_not_taken_is_counted_and_leaves_the_means_alone(tmp_path):
    monitor = new_monitor(tmp_path, log_every=4)
    monitor.start(1, "", {})
    for step in range(1, 5):
        report = step_report(step, loss=float("nan") if step == 3 else 1.0)
        monitor.step(replace(report, taken=step != 3, grad_norm=float("inf") if step == 3 else 2.0), None)
    monitor.close()
    assert curve(tmp_path, "train/skipped_steps") == {1: 0, 4: 1}
    assert curve(tmp_path, "train/loss") == {1: 1.0, 4: 1.0} and curve(tmp_path, "train/grad_norm")[4] == 2.0


def test_unknown_peak_text_only_and_no_balancer_leave_their_scalars_out(tmp_path):
    monitor = make_monitor(
        run_config(),
        rank=0,
        total_steps=5,
        flops_per_token=1e6,
        peak_flops=None,
        run_dir=tmp_path,
        console=Console(quiet=True),
    )
    monitor.start(1, "", {})
    text_only = RoutingReport(np.full((2, 4), 7), np.zeros((2, 4), int), 1.0, None)
    monitor.step(step_report(1), text_only)
    monitor.close()
    tags = events(tmp_path).Tags()["scalars"]
    assert "moe/max_vio" in tags
    assert not {"perf/mfu", "moe/max_vio_text", "moe/max_vio_image", "moe/aux_loss"} & set(tags)


def test_curves_go_on_without_a_fold_after_a_resume(tmp_path):
    killed = new_monitor(tmp_path, log_every=5)
    killed.start(1, "", {})
    train(killed, 1, 30, loss=1.0)  # the last checkpoint was at 20: 21 ... 30 are lost
    killed.close()
    resumed = new_monitor(tmp_path, log_every=5)
    resumed.start(21, "", {})
    train(resumed, 21, 25, loss=2.0)
    resumed.close()
    assert curve(tmp_path, "train/loss") == {1: 1, 5: 1, 10: 1, 15: 1, 20: 1, 25: 2}


def test_heat_maps_come_when_due_with_the_counts_of_all_steps_since_the_last(tmp_path):
    monitor = new_monitor(tmp_path, log_every=10, heatmap_every=25)
    monitor.start(1, "", {})
    for step in range(1, 101):
        train(monitor, step, step)
        wait_for_pictures(monitor)  # one still being drawn would put the next off
    monitor.finish({})
    log = events(tmp_path)
    drawn = [image.step for image in log.Images("moe/expert_load")]
    assert drawn == [30, 50, 80, 100]  # the first log steps past 25, 50, 75 and 100
    counts = np.array(log.Tensors(LOAD_TAG)[1].tensor_proto.int64_val).reshape(2, LAYERS, EXPERTS)
    expected = [routing_report(40), routing_report(50)]
    np.testing.assert_array_equal(counts[0], sum(report.counts_LE for report in expected))
    np.testing.assert_array_equal(counts[1], sum(report.image_counts_LE for report in expected))


def test_loads_by_kind_of_record_are_summed_and_drawn(tmp_path):
    monitor = new_monitor(tmp_path, total_steps=20)
    monitor.start(1, "", {})
    for step in (10, 20):
        report = routing_report(step)
        half_LE = report.counts_LE // 2
        report.kind_counts_LE = {"digit": half_LE, "parity": report.counts_LE - half_LE}
        monitor.step(step_report(step), report)
        wait_for_pictures(monitor)
    summed = monitor._load.kind_counts_LE
    np.testing.assert_array_equal(summed["digit"] + summed["parity"], monitor._load.counts_LE)
    monitor.finish({})
    log = events(tmp_path)
    assert [image.step for image in log.Images("moe/expert_load_by_kind")] == [20]
    [histogram] = log.Histograms("moe/load")
    assert histogram.histogram_value.num == LAYERS * EXPERTS


def test_steps_behind_the_last_heat_map_are_drawn_at_the_end(tmp_path):
    monitor = new_monitor(tmp_path, total_steps=20, heatmap_every=1000)
    monitor.start(1, "", {})
    train(monitor, 1, 20)
    monitor.finish({"loss": "0.1"})
    assert [image.step for image in events(tmp_path).Images("moe/expert_load")] == [20]


def test_without_tensorboard_nothing_is_written(tmp_path):
    monitor = new_monitor(tmp_path, tensorboard=False)
    monitor.start(1, "", {})
    train(monitor, 1, 20)
    monitor.evaluated(eval_report(20))
    monitor.finish({})
    assert not list(tmp_path.iterdir())


def test_other_ranks_agree_on_log_steps_and_do_nothing(tmp_path, capsys):
    silent = make_monitor(run_config(), rank=1, total_steps=25, flops_per_token=None, peak_flops=None, run_dir=tmp_path)
    silent.start(1, "summary", {})
    train(silent, 1, 25)
    silent.evaluated(eval_report(25))
    silent.note("note")
    silent.finish({"loss": "0.1"})
    silent.close()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
    loud = new_monitor(tmp_path, total_steps=25)
    steps = range(1, 26)
    assert [silent.is_log_step(s) for s in steps] == [loud.is_log_step(s) for s in steps]
    assert [s for s in steps if silent.is_log_step(s)] == [1, 10, 20, 25]


def test_a_process_that_ends_without_finishing_leaves_its_curves(tmp_path):
    program = f"""
from pathlib import Path
from tests.monitor.test_monitor import new_monitor, train
monitor = new_monitor(Path({str(tmp_path)!r}))
monitor.start(1, "", {{}})
train(monitor, 1, 20)
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 3
    assert list(curve(tmp_path, "train/loss")) == [1, 10, 20]


# --- pictures --------------------------------------------------------------------------------------------------------


def has_color(picture: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((np.abs(picture.astype(int) - color).max(axis=2) <= 2).any())


def test_heat_map_shows_dead_experts_black_and_repaints_cleanly():
    balanced = {"all": np.full((4, 64), 10)}
    heat_map = LoadHeatMap(4, 64, ("all",))
    first = heat_map.draw(balanced, "caption")
    skewed = np.full((4, 64), 10)
    skewed[1, :32] = 0
    second = heat_map.draw({"all": skewed}, "caption")
    rows, columns = first.shape[:2]
    middle = np.s_[rows // 4 : -rows // 4, columns // 8 : columns // 2]  # within the cells
    assert has_color(second[middle], (0, 0, 0)) and not has_color(first[middle], (0, 0, 0))
    np.testing.assert_array_equal(heat_map.draw(balanced, "caption"), first)


@pytest.mark.parametrize("layers, experts", [(1, 2), (2, 8), (48, 128)])
def test_heat_map_of_any_model_has_a_readable_size(layers, experts):
    heat_map = LoadHeatMap(layers, experts, ("all", "text", "image"))
    picture = heat_map.draw(dict.fromkeys(heat_map.kinds, np.ones((layers, experts), int)), "caption")
    assert picture.dtype == np.uint8 and 300 < picture.shape[1] < 1600 and picture.shape[0] < 2000


def test_gallery_takes_any_mode_and_any_text():
    samples = [
        ShownSample(Image.new("L", (8, 8)), "", "4", ""),
        ShownSample(Image.new("RGBA", (4000, 30)), "$x^2$ \\frac " * 40, "yes", "yes\n"),
        ShownSample(None, "这张图片里有什么？" * 9, "猫", "狗"),
        *[ShownSample(Image.new("P", (30, 400)), "A question", "a", "a")] * 3,
    ]
    pictures = [sample_gallery(samples[:count], "caption") for count in (1, 4, 6)]
    assert [picture.shape[1] for picture in pictures] == [340, 500, 750]
    assert pictures[0].shape[0] < pictures[1].shape[0] == pictures[2].shape[0]
    assert pictures[1].std() > 10


# --- what a person reads ---------------------------------------------------------------------------------------------


def test_a_log_file_gets_one_plain_line_a_window(tmp_path):
    out = io.StringIO()
    monitor = new_monitor(tmp_path, console=Console(file=out), log_every=10)
    monitor.start(1, "SUMMARY", {})
    train(monitor, 1, 20)
    monitor.evaluated(eval_report(20))
    monitor.note("checkpoint written: runs/demo/step-20")
    monitor.finish({"held-out accuracy": "0.95", "checkpoint": "/a/rather/long/path/" + "x" * 120})
    lines = out.getvalue().splitlines()
    assert lines[0] == "SUMMARY"
    assert [line.split("  loss")[0] for line in lines[1:4]] == ["step   1/100", "step  10/100", "step  20/100"]
    for part in ("loss 0.13", "lr 1.00e-03", "2,000 tokens/s", "0.5 s/step", "ETA 0:0"):
        assert part in lines[3]
    assert lines[4] == "eval at step 20  loss 0.3000  accuracy 0.950 (digit 0.900, even or odd 1.000)"
    assert lines[5] == "checkpoint written: runs/demo/step-20"
    assert any("held-out accuracy" in line and "0.95" in line for line in lines[6:])
    assert any("x" * 120 in line for line in lines[6:])  # not wrapped
    assert "\x1b" not in out.getvalue() and out.getvalue().count("step  20/100") == 1


def test_a_terminal_gets_a_bar(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, _environ={"TERM": "xterm-256color"})
    monitor = new_monitor(tmp_path, console=console, log_every=10)
    monitor.start(1, "SUMMARY", {})
    train(monitor, 1, 50)
    monitor.evaluated(eval_report(50))
    train(monitor, 51, 60)
    monitor.note("a note with [brackets]")
    monitor.close()
    for part in ("60/100", "loss 0.0333", "accuracy 0.950", "2,000 tokens/s", "ETA 0:00:0", "a note with [brackets]"):
        assert part in out.getvalue(), part
    assert out.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_a_table_fits_a_narrow_terminal_and_keeps_brackets(capsys):
    print_table({"path": "runs/[demo]", "loss": "0.1"}, "result")
    assert "runs/[demo]" in capsys.readouterr().out


# --- cost ------------------------------------------------------------------------------------------------------------


def test_monitoring_costs_next_to_nothing(tmp_path, record_property):
    monitor = new_monitor(tmp_path, total_steps=400, heatmap_every=10_000)
    monitor.start(1, "", {})
    train(monitor, 1, 200)  # imports, first flush
    reports = [
        (step_report(step), routing_report(step) if monitor.is_log_step(step) else None) for step in range(201, 401)
    ]
    began_s = time.process_time()  # other processes do not count
    for report, routing in reports:
        monitor.step(report, routing)
    cost_ms = (time.process_time() - began_s) / len(reports) * 1e3
    overhead = monitor.overhead()
    monitor.close()
    assert len(curve(tmp_path, "train/loss")) == 41  # nothing was saved by not writing
    record_property("monitor_ms_per_step", cost_ms)
    print(f"monitor.step: {cost_ms:.3f} ms a step, {100 * overhead:.3f} % of a 0.5 s step")
    assert cost_ms < 2  # a tenth of that on a quiet machine
    assert 0 < overhead < 0.1
