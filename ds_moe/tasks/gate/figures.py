"""Pictures of a gate: its confusion matrix, and how certain it is.

As in `monitor/heatmap.py`, they are drawn on matplotlib's Agg canvas without pyplot, so that there is no global state
and nothing to close. People with any common colour blindness can tell blue (right) and orange (wrong) apart.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ds_moe.monitor.heatmap import FAINT, INK
from ds_moe.tasks.gate.scores import RoutingScores, check_probabilities

CHOSEN, OTHERS = "#0072B2", "#BBBBBB"  # Okabe & Ito's blue, and grey
BINS = 20
_NAME_LENGTH = 22  # letters of an adapter's name that are shown; a longer name loses its middle
_LETTER = 0.085  # width of a letter of the names, in inches


def confusion_figure(scores: RoutingScores) -> np.ndarray:
    """Draw the confusion matrix (rows: the right adapter, columns: the predicted one) as uint8 (height, width, 3).

    A cell's colour is its share of the row, so that the diagonal shows recall, however many requests a row has.
    """
    names = [_short(name) for name in scores.names]
    cell = float(np.clip(11 / len(names), 0.5, 0.9 if len(names) > 2 else 1.2))  # inches
    side, longest = cell * len(names), _LETTER * max(map(len, names))
    steep = longest > cell - 0.1  # names too long to stand side by side
    left, top, right, bottom = 0.6 + longest, 1.05, 0.85, 0.65 + (0.57 * longest if steep else 0)
    width, height = max(left + side + right, 3.6), top + side + bottom
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    share_KK = scores.confusion_KK / np.maximum(scores.support_K, 1)[:, None]
    right_KKC, wrong_KKC = colormaps["Blues"](0.85 * share_KK), colormaps["Oranges"](0.85 * share_KK)
    colors_KKC = np.where(np.eye(len(names), dtype=bool)[..., None], right_KKC, wrong_KKC)
    colors_KKC[scores.confusion_KK == 0] = (0.965, 0.965, 0.965, 1)
    axes.pcolormesh(colors_KKC, edgecolors="white", linewidth=2)
    for (row, column), count in np.ndenumerate(scores.confusion_KK):
        style = {"color": _ink_on(colors_KKC[row, column]) if count else "#A8A8A8", "ha": "center", "va": "center"}
        style |= {"weight": "bold" if row == column and count else "normal"}
        size = min(12.0, 100 * cell / max(5, len(f"{count:,}")))  # in points, so that the number fits into the cell
        axes.text(column + 0.5, row + 0.5, f"{count:,}", fontsize=size, **style)
    _name_cells(axes, names, steep)
    recalls = [f"{recall:.0%}" if n else "-" for recall, n in zip(scores.recall_K, scores.support_K, strict=True)]
    for row, recall in enumerate(["recall", *recalls]):
        color, place = (INK, row - 0.5) if row else (FAINT, -0.14 / cell)
        axes.text(len(names) + 0.12 / cell, place, recall, fontsize=9, color=color, va="center")
    at, title = 0.16 / width, f"Routing accuracy {scores.accuracy:.1%}"
    figure.text(at, 1 - 0.28 / height, title, fontsize=13, color=INK, weight="bold", va="center")
    note = f"{scores.correct:,} of {scores.total:,} requests"
    figure.text(at, 1 - 0.55 / height, note, fontsize=9.5, color=FAINT, va="center")
    return _pixels(figure)


def _name_cells(axes: Axes, names: list[str], steep: bool) -> None:
    middles = np.arange(len(names)) + 0.5
    axes.invert_yaxis()
    slant = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if steep else {}
    axes.set_xticks(middles, names, **slant)
    axes.set_yticks(middles, names)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("routed to", fontsize=9.5, color=FAINT, labelpad=6)
    axes.set_ylabel("asked for", fontsize=9.5, color=FAINT, labelpad=6)


def gate_histogram(probabilities_NK: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Draw how probable the gate finds each adapter, as uint8 (height, width, 3): a histogram for each adapter.

    Requests are on a log scale, and those routed to the adapter are blue. The probabilities of a certain gate are near
    0 and 1, those of an uncertain one near 1 / K (dotted). Raises ValueError as `routing_scores` does.
    """
    probabilities_NK = check_probabilities(probabilities_NK, names)
    total, adapters = probabilities_NK.shape
    columns = adapters if adapters <= 3 else 2 if adapters == 4 else 3 if adapters <= 9 else 4
    rows = -(-adapters // columns)
    figure = Figure(figsize=(3.3 * columns + 0.5, 1.75 * rows + 1.2), dpi=100, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.03, hspace=0.03)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    chosen_N, edges = probabilities_NK.argmax(1), np.linspace(0, 1, BINS + 1)
    for k, axes in enumerate(panels[:adapters]):
        values_N = probabilities_NK[:, k].clip(0, 1)
        mine_N = values_N[chosen_N == k]
        _, _, others = axes.hist(values_N, edges, color=OTHERS, rwidth=0.88)
        _, _, chosen = axes.hist(mine_N, edges, color=CHOSEN, rwidth=0.88)
        even = axes.axvline(1 / adapters, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        axes.set_title(_short(names[k]), fontsize=9.5, color=INK, loc="left", pad=5)
        routed = f"{len(mine_N):,} ({len(mine_N) / total:.0%})"
        axes.set_title(routed, fontsize=9, color=CHOSEN if len(mine_N) else FAINT, loc="right", pad=5)
        _finish(axes, total, labelled=k + columns >= adapters)
    for axes in panels[adapters:]:
        axes.set_visible(False)
    handles, labels = (chosen[0], others[0], even), ("routed here", "routed elsewhere", f"1 / {adapters}: no idea")
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    figure.supxlabel("probability that the gate gives to the adapter", fontsize=9, color=FAINT)
    figure.supylabel("requests", fontsize=9, color=FAINT)
    return _pixels(figure)


def _finish(axes: Axes, total: int, labelled: bool) -> None:
    axes.set_yscale("log")
    axes.set_ylim(0.6, 1.6 * total)  # so that a single request is visible
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
    axes.tick_params(length=0, labelsize=8, colors=INK, labelbottom=labelled)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=OTHERS)
    axes.grid(axis="y", color="#EBEBEB", linewidth=0.8)
    axes.set_axisbelow(True)


def _ink_on(color: np.ndarray) -> str:
    """White or dark, whichever is easier to read on this color, by relative luminance as defined in WCAG 2.1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    return "white" if float(np.dot(linear, (0.2126, 0.7152, 0.0722))) < 0.3 else INK


def _short(name: str) -> str:
    keep = (_NAME_LENGTH - 3) // 2
    return name if len(name) <= _NAME_LENGTH else f"{name[:keep]}...{name[-keep:]}"


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
