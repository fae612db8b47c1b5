"""The figure of replay_demo: reward and mismatch of each round, with replay and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ds_moe.monitor.plot import finish_axes

STYLES = {"with replay": ("#0072B2", "o"), "without": ("#D55E00", "s")}  # Okabe & Ito's colours, and a marker
PANELS = {"reward": "Mean reward of the rollouts", "mismatch_k3": "k3 between engine and trainer"}


def write_figure(rounds: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """PNG of the rounds of each arm."""
    figure = Figure(figsize=(9, 3.4), dpi=150, facecolor="white", layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for arm, found in rounds.items():
            color, marker = STYLES[arm]
            values = [one[name] for one in found]
            axes.plot(range(1, len(values) + 1), values, color=color, marker=marker, markersize=4, label=arm)
        finish_axes(axes, title)
        axes.set_xlabel("round", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", scilimits=(-3, 3))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(file)
