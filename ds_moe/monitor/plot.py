"""Draw a run from its TensorBoard event files: training loss, held-out accuracy and expert load in one picture.

Examples:

    python -m ds_moe.monitor.plot runs/demo --out demo.png
    python -m ds_moe.monitor.plot runs/demo --json curves.json    # every scalar of the run: {tag: [[step, value], ...]}
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_moe.errors import UserError
from ds_moe.monitor.board import LOAD_TAG
from ds_moe.monitor.heatmap import FAINT, INK, LoadPanel, draw_load_scale
from ds_moe.monitor.meters import split_by_kind

Curve = list[tuple[int, float]]
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # of Okabe & Ito
WIDTH_IN, CURVES_IN = 9.6, 2.7


def read_events(run: Path) -> EventAccumulator:
    """All events of the newest run in the folder `run` or below it. Raises `UserError` if there are none."""
    files = sorted(run.rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UserError(f"{run}: no TensorBoard event files below it; give the output_dir of a run")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # TensorBoard warns about every resume
    return EventAccumulator(str(files[-1].parent), {"scalars": 0, "tensors": 0, "images": 1}).Reload()


def read_load(events: EventAccumulator) -> tuple[int, np.ndarray, np.ndarray] | None:
    """Step, counts_LE and image_counts_LE behind the last heat map; None for a model without experts."""
    if LOAD_TAG not in events.Tags()["tensors"]:
        return None
    last = events.Tensors(LOAD_TAG)[-1]
    shape = [dim.size for dim in last.tensor_proto.tensor_shape.dim]
    counts_LE, image_counts_LE = np.array(last.tensor_proto.int64_val, dtype=np.int64).reshape(shape)
    return last.step, counts_LE, image_counts_LE


def draw(curves: dict[str, Curve], load: tuple[int, np.ndarray, np.ndarray] | None) -> Figure:
    """Draw curves in the upper row, and below them the load by all, text and image tokens on the last steps."""
    kinds = split_by_kind(*load[1:]) if load else {}
    layers, experts = load[1].shape if load else (0, 0)
    panel_in = float(np.clip(0.3 * layers, 0.6, 3))
    beside = experts <= 16
    panel_rows = 0 if not load else 1 if beside else len(kinds)
    height_in = 0.45 + CURVES_IN + 0.6 + panel_rows * (panel_in + 0.55) + (0.55 if load else 0)
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=160, facecolor="white")

    def axes_at(x: float, top: float, w: float, h: float) -> Axes:  # inches from the upper left corner
        return figure.add_axes((x / WIDTH_IN, 1 - (top + h) / height_in, w / WIDTH_IN, h / height_in))

    draw_loss(axes_at(0.65, 0.4, 3.9, CURVES_IN), curves)
    draw_accuracy(axes_at(5.3, 0.4, 3.9, CURVES_IN), curves)
    if load:
        top = 0.45 + CURVES_IN + 1.1
        title = f"Expert load relative to a fair share, at step {load[0]:,}"
        figure.text(0.65 / WIDTH_IN, 1 - (top - 0.36) / height_in, title, fontsize=10, color=INK)
        span = WIDTH_IN - 0.65 - 1.35  # of the panels; the scale stands to their right
        width = (span - 0.3 * (len(kinds) - 1)) / len(kinds) if beside else span
        for i, (kind, counts_LE) in enumerate(kinds.items()):
            x, y = (0.65 + i * (width + 0.3), top) if beside else (0.65, top + i * (panel_in + 0.55))
            last = beside or i == len(kinds) - 1
            axes = axes_at(x, y, width, panel_in)
            first = i == 0 or not beside
            panel = LoadPanel(axes, (layers, experts), kind, bottom=last, left=first, numbers=experts <= 8)
            panel.show(counts_LE)
        draw_load_scale(axes_at(WIDTH_IN - 1.15, top, 0.12, max(panel_in, 0.9)))
    return figure


def draw_loss(axes: Axes, curves: dict[str, Curve]) -> None:
    for tag, label, color in (("train/loss", "training", COLORS[0]), ("eval/loss", "held-out", COLORS[5])):
        if tag in curves:
            axes.plot(*zip(*curves[tag], strict=True), color=color, label=label, linewidth=1.8)
    finish_axes(axes, "Loss")
    axes.set_ylim(bottom=0)
    if axes.get_lines():
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)


def draw_accuracy(axes: Axes, curves: dict[str, Curve]) -> None:
    """Draw the mean accuracy in black, and that of each kind of question in color."""
    prefix = "eval/accuracy_"
    kinds = [tag for tag in curves if tag.startswith(prefix)]
    for tag, color in zip(kinds, COLORS, strict=False):
        label = tag.removeprefix(prefix).replace("_", " ")
        axes.plot(*zip(*curves[tag], strict=True), color=color, label=label, linewidth=1.3, marker="o", markersize=3)
    if "eval/accuracy" in curves:
        mean = curves["eval/accuracy"]
        label = f"mean ({mean[-1][1]:.3f} at the end)"
        axes.plot(*zip(*mean, strict=True), color=INK, label=label, linewidth=2, marker="o", markersize=4)
    finish_axes(axes, "Held-out accuracy of generated answers")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    if axes.get_lines():
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="lower right")


def finish_axes(axes: Axes, title: str, label: str | None = None) -> None:
    """Title, grid and faint ticks; without a `label` x are optimizer steps."""
    axes.set_title(title, fontsize=10, color=INK, loc="left", pad=8)
    axes.set_xlabel("optimizer step" if label is None else label, fontsize=9, color=INK)
    if label is None:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(labelsize=8.5, colors=FAINT, length=0)
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#BBBBBB")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's output_dir (or any folder above its event files)")
    parser.add_argument("--out", type=Path, help="PNG to write, such as demo.png")
    parser.add_argument("--json", type=Path, help="file to write every scalar to")
    options = parser.parse_args(arguments)
    if not options.out and not options.json:
        parser.error("nothing to do: give --out, --json or both")
    try:
        events = read_events(options.run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tags = sorted(events.Tags()["scalars"])
    curves = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(curves) + "\n")
        print(f"{options.json}: {len(curves)} scalars")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figure = draw(curves, read_load(events))
        FigureCanvasAgg(figure).print_png(str(options.out))
        print(f"{options.out}: {', '.join(tag for tag in curves if tag.startswith(('train/loss', 'eval/accuracy')))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
