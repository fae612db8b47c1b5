"""What `ds-moe plot` does: the curves of one run or of several, from TensorBoard event files, as one picture."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_moe.errors import UserError, one_line
from ds_moe.monitor.board import LOAD_TAG
from ds_moe.monitor.heatmap import FAINT, INK, LoadPanel, draw_load_scale
from ds_moe.monitor.meters import split_by_kind

Curve = list[tuple[int, float]]
Load = tuple[int, np.ndarray, np.ndarray]  # step, counts_LE and image_counts_LE behind a heat map
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # of Okabe & Ito
STYLES = ("-", (0, (3, 1.5)))  # of the curves of one panel, where colors tell runs apart
FORMATS = (".png", ".svg", ".pdf")
COLUMNS, PANEL_W_IN, PANEL_H_IN = 3, 3.9, 2.7
DOTTED, SMOOTHED = 40, 80  # a curve of fewer points has dots, one of more has their running mean drawn over it
BESIDE = 16  # experts; load panels of more stand one below the other


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis, tag -> label.

    Attributes:
        details: more of them, drawn only where a single run is.
        kinds: the prefix of tags that are drawn then too, one for each kind of record.
        exact: no running mean, which would bend what has no noise.
        whole: the axis begins at 0, however far from it the values are.
    """

    title: str
    tags: dict[str, str]
    details: dict[str, str] = field(default_factory=dict)
    kinds: str | None = None
    percent: bool = False
    exact: bool = False
    whole: bool = False


PANELS = (
    Panel("Loss", {"train/loss": "training", "eval/loss": "held-out"}),
    Panel("Held-out answers that match", {"eval/accuracy": "mean"}, kinds="eval/accuracy_", percent=True),
    Panel("Right routes", {"gate/routing_accuracy": "training", "eval/routing_accuracy": "held-out"}, percent=True),
    Panel("Mean reward of the rollouts", {"rl/reward": "reward"}),
    Panel(
        "Balance of the experts: MaxVio (0: even)",
        {"moe/max_vio": "all tokens"},
        details={"moe/max_vio_text": "text tokens", "moe/max_vio_image": "image tokens"},
    ),
    Panel("Learning rate", {"train/lr": ""}, exact=True),
    Panel("Gradient norm", {"train/grad_norm": ""}),
    Panel("Tokens per second", {"perf/tokens_per_s": ""}, whole=True),
)


@dataclass(frozen=True)
class DrawnRun:
    """What is drawn of one run; `load` is that of the last heat map, None for a model without experts."""

    name: str
    curves: dict[str, Curve]
    load: Load | None = None


def plot(folders: Sequence[Path], out: Path | None, scalars: Path | None) -> None:
    """Draw the runs of `folders` into `out`, write their scalars into the file `scalars`, and say so.

    Raises `UserError` for a folder without curves, an ending of `out` that is no picture's, and a file that cannot be
    written.
    """
    out = out or (folders[0] if len(folders) == 1 else Path()) / "plot.png"
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {out}: a picture ends in {', '.join(FORMATS)}")
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    figure, replaced = draw(runs), " (replaced)" if out.exists() else ""
    try:
        if scalars is not None:
            curves = {run.name: run.curves for run in runs}
            scalars.parent.mkdir(parents=True, exist_ok=True)
            scalars.write_text(json.dumps(curves if len(runs) > 1 else runs[0].curves) + "\n")
            print(f"{scalars}: {sum(len(run.curves) for run in runs)} scalars")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror or one_line(error)}") from error
    steps = ", ".join(f"{run.name} to step {max(curve[-1][0] for curve in run.curves.values()):,}" for run in runs)
    print(f"{out}{replaced}: {steps}")


def read_run(folder: Path) -> DrawnRun:
    """The curves of a run's output folder, or of the folder that holds its event files.

    Raises `UserError` where there are none, and where several runs lie below the folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the train.output_dir of a run")
    found = sorted({file.parent for file in folder.rglob("events.out.tfevents.*")})
    if not found:
        raise UserError(f"{folder}: no TensorBoard event files below it; give the train.output_dir of a run")
    if len(found) > 1:
        named = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
        raise UserError(f"{folder}: {len(found)} runs lie below it; give one or more of {named}")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # TensorBoard warns about every resume
    try:
        events = EventAccumulator(str(found[0]), {"scalars": 0, "tensors": 0, "images": 1}).Reload()
        tags = sorted(events.Tags()["scalars"])
        curves = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}
        load = _read_load(events)
    except Exception as error:  # its readers raise anything for bytes that are no events
        raise UserError(f"{found[0]}: event files that cannot be read: {one_line(error)}") from error
    if not any(tag in curves for panel in PANELS for tag in panel.tags):
        raise UserError(f"{found[0]}: event files without a curve; has the run finished its first step?")
    return DrawnRun(str(folder), curves, load)


def _read_load(events: EventAccumulator) -> Load | None:
    if LOAD_TAG not in events.Tags()["tensors"]:
        return None
    last = events.Tensors(LOAD_TAG)[-1]
    shape = [dim.size for dim in last.tensor_proto.tensor_shape.dim]
    counts_LE, image_counts_LE = np.array(last.tensor_proto.int64_val, dtype=np.int64).reshape(shape)
    return last.step, counts_LE, image_counts_LE


@rc_context({"text.parse_math": False})  # names of folders and kinds may have $ in them
def draw(runs: Sequence[DrawnRun]) -> Figure:
    """A panel for each group of curves that the runs have, and of a single run the load of its experts below them."""
    panels = [panel for panel in PANELS if any(tag in run.curves for run in runs for tag in panel.tags)]
    load = runs[0].load if len(runs) == 1 else None
    columns = min(COLUMNS, len(panels) if load is None else COLUMNS)
    rows = math.ceil(len(panels) / columns)
    heights = [rows * PANEL_H_IN, _load_height(load)] if load else [rows * PANEL_H_IN]
    size = (columns * PANEL_W_IN + 0.2, sum(heights) + 0.5)
    figure = Figure(figsize=size, dpi=160, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.05)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for number, panel in enumerate(panels):
        draw_panel(parts[0].add_subplot(rows, columns, number + 1), panel, runs)
    if load:
        _draw_load(parts[1], load)
    if len(runs) == 1:
        figure.suptitle(runs[0].name, x=0.01, ha="left", fontsize=12, color=INK, fontweight="bold")
    else:
        handles = [Line2D([], [], color=color, linewidth=2.5) for color in _run_colors(len(runs))[: len(runs)]]
        names = [run.name for run in runs]
        place = {"loc": "outside upper left", "ncols": min(len(runs), 2 * columns)}
        figure.legend(handles, names, frameon=False, fontsize=10, labelcolor=INK, **place)
    return figure


def _run_colors(count: int) -> Sequence[str | tuple[float, ...]]:
    return COLORS if count <= len(COLORS) else [colormaps["turbo"](0.05 + 0.9 * i / (count - 1)) for i in range(count)]


def draw_panel(axes: Axes, panel: Panel, runs: Sequence[DrawnRun]) -> None:
    """Of a single run its tags in colors, with the last values; of several the runs in colors, the tags in styles."""
    if len(runs) == 1:
        curves = runs[0].curves
        tags = panel.tags | panel.details
        if panel.kinds and (kinds := [tag for tag in curves if tag.startswith(panel.kinds)]):
            tags = {tag: tag.removeprefix(panel.kinds).replace("_", " ") for tag in kinds} | tags
        shown = {tag: label for tag, label in tags.items() if tag in curves}
        for (tag, label), color in zip(shown.items(), _run_colors(len(shown)), strict=False):
            mean = tag == "eval/accuracy" and len(shown) > 1
            named = f"{label}  {_number(curves[tag][-1][1], panel)}"
            draw_curve(axes, curves[tag], INK if mean else color, label=named, exact=panel.exact)
    else:
        shown = {tag: label for tag, label in panel.tags.items() if any(tag in run.curves for run in runs)}
        for run, color in zip(runs, _run_colors(len(runs)), strict=False):
            for tag, style in zip(shown, STYLES, strict=False):
                if tag in run.curves:
                    draw_curve(axes, run.curves[tag], color, style, exact=panel.exact)
        for label, style in zip(shown.values(), STYLES, strict=False):
            axes.plot([], [], color=FAINT, linestyle=style, label=label)
    finish_axes(axes, panel.title)
    lowest, highest = axes.dataLim.intervaly
    if 0 <= lowest < highest / 2 or panel.percent or panel.whole:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1) if panel.percent else FuncFormatter(lambda v, _: _number(v)))
    if panel.percent:
        axes.set_ylim(top=1.02)
    if len(shown) > 1:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)
    elif len(runs) == 1:
        [last] = [curves[tag][-1][1] for tag in shown]
        axes.set_title(_number(last, panel), fontsize=9, color=FAINT, loc="right", pad=8)


def draw_curve(
    axes: Axes, curve: Curve, color: object, style: object = "-", label: str | None = None, exact: bool = False
) -> None:
    """One curve; through many points, unless they are `exact`, their running mean over the points in a pale color."""
    steps, values = np.array(curve, dtype=np.float64).T
    dots = {"marker": "o", "markersize": 3} if len(curve) <= DOTTED else {}
    if len(curve) > SMOOTHED and not exact:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
        values = running_mean(values, len(curve) // 40)
    axes.plot(steps, values, color=color, linestyle=style, linewidth=1.8, label=label, **dots)


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of each value and `reach` neighbours on both sides, as far as there are any that are numbers."""
    window, known = np.ones(2 * reach + 1), np.isfinite(values)
    sums = np.convolve(np.where(known, values, 0), window, "same")
    counts = np.convolve(known, window, "same")
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0.5)


def _number(value: float, panel: Panel | None = None) -> str:
    if panel is not None and panel.percent:
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def finish_axes(axes: Axes, title: str, label: str | None = None) -> None:
    """Title, grid and faint ticks; without a `label` x are optimizer steps."""
    axes.set_title(title, fontsize=10, color=INK, loc="left", pad=8)
    axes.set_xlabel("optimizer step" if label is None else label, fontsize=9, color=INK)
    if label is None:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=8.5, colors=FAINT, length=0)
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#BBBBBB")


def _load_height(load: Load) -> float:
    """Inches that the panels of `_draw_load` take."""
    layers, experts = load[1].shape
    panels = 1 if experts <= BESIDE else len(split_by_kind(*load[1:]))
    return 0.5 + panels * (float(np.clip(0.3 * layers, 0.9, 3)) + 0.6)


def _draw_load(figure: SubFigure, load: Load) -> None:
    """The load by all, text and image tokens on the last steps."""
    step, *counts = load
    kinds, (layers, experts) = split_by_kind(*counts), counts[0].shape
    rows, columns = (1, len(kinds)) if experts <= BESIDE else (len(kinds), 1)
    title = f"Load of the experts relative to a fair share, at step {step:,}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    grid = figure.add_gridspec(rows, columns + 1, width_ratios=[*[1.0] * columns, 0.02 * columns])
    for number, (kind, counts_LE) in enumerate(kinds.items()):
        row, column = divmod(number, columns)
        ends = {"bottom": row == rows - 1, "left": column == 0, "numbers": experts <= 8}
        panel = LoadPanel(figure.add_subplot(grid[row, column]), (layers, experts), kind, **ends)
        panel.show(counts_LE)
    draw_load_scale(figure.add_subplot(grid[0, -1]))
