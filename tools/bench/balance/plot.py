"""The benchmark's figure: balance over time, balance by layer, and what it costs in held-out loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ds_moe.monitor.heatmap import FAINT, INK
from ds_moe.monitor.plot import finish_axes

STYLES = {  # Okabe & Ito's colours, and a marker for those who see none
    "none": ("#D55E00", "s"),
    "aux": ("#E69F00", "^"),
    "loss_free": ("#0072B2", "o"),
    "aux+loss_free": ("#009E73", "D"),
}
SMALL = {"fontsize": 7.5, "color": INK}


def write_figure(result: dict[str, Any], file: Path, target: float) -> None:
    """PNG of a result of the benchmark, with its `summary`; `target` is the MaxVio_global drawn as a line."""
    figure = Figure(figsize=(12, 3.7), dpi=150, facecolor="white", layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1.15, 1.15, 1))
    draw_time(axes[0], result["runs"], target)
    draw_layers(axes[1], result["summary"])
    draw_loss(axes[2], result["summary"])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(file)


def draw_time(axes: Axes, runs: list[dict[str, Any]], target: float) -> None:
    """Mean over seeds as a line, their range as a band."""
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run["points"] for run in runs if run["method"] == method]
        steps = [point["step"] for point in mine[0]]
        vio_SP = np.array([[np.mean(point["max_vio_L"]) for point in points] for points in mine])
        color, marker = STYLES[method]
        axes.plot(steps, vio_SP.mean(axis=0), color=color, marker=marker, markersize=4, linewidth=1.6, label=method)
        axes.fill_between(steps, vio_SP.min(axis=0), vio_SP.max(axis=0), color=color, alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.axhline(target, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(f"target {target:g}", (0.01, target), (0, 2), ("axes fraction", "data"), "offset points", **SMALL)
    finish_axes(axes, "MaxVio_global on held-out text, mean over layers")


def draw_layers(axes: Axes, summary: dict[str, Any]) -> None:
    """Bars from zero with their value, a dot for each seed."""
    width = 0.84 / len(summary)
    for position, (method, figures) in enumerate(summary.items()):
        vio_SL = np.array(figures["max_vio_L"])
        x_L = np.arange(vio_SL.shape[1]) + (position - (len(summary) - 1) / 2) * width
        axes.bar(x_L, vio_SL.mean(axis=0), width * 0.92, color=STYLES[method][0])
        axes.plot(x_L, vio_SL.T, ".", color=INK, markersize=3)
        for x, values in zip(x_L, vio_SL.T, strict=True):
            above = (x, values.max())
            axes.annotate(f"{values.mean():.2f}", above, (0, 3), "data", "offset points", ha="center", **SMALL)
    finish_axes(axes, "MaxVio_global by layer, last step")
    axes.set_axisbelow(True)
    axes.set_xlabel("MoE layer", fontsize=9, color=INK)
    axes.set_xticks(range(vio_SL.shape[1]))
    axes.set_xlim(-0.5, vio_SL.shape[1] - 0.5)
    axes.grid(visible=False, axis="x")


def draw_loss(axes: Axes, summary: dict[str, Any]) -> None:
    """A dot for each seed, those of one seed joined; a bar at the mean."""
    loss_MS = np.array([figures["loss"] for figures in summary.values()])
    axes.plot(range(len(summary)), loss_MS, color="#CCCCCC", linewidth=1, zorder=1)
    for position, (method, losses_S) in enumerate(zip(summary, loss_MS, strict=True)):
        color, marker = STYLES[method]
        axes.plot([position] * len(losses_S), losses_S, marker, color=color, markersize=5)
        axes.hlines(losses_S.mean(), position - 0.25, position + 0.25, color=color, linewidth=2)
    finish_axes(axes, "Held-out loss, nats a byte, last step")
    axes.set_xlabel("one mark a seed, joined by seed; bar: mean", fontsize=9, color=INK)
    axes.set_xticks(range(len(summary)), list(summary), fontsize=8.5)
    axes.set_xlim(-0.5, len(summary) - 0.5)
    axes.grid(visible=False, axis="x")
