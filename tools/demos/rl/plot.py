"""The picture of `make rl-demo`: reward, mismatch, routers that differ, and where a round's time goes."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from ds_moe.monitor.plot import finish_axes

STYLES = {"with replay": ("#0072B2", "o"), "without": ("#D55E00", "s")}  # Okabe & Ito's colours, and a marker
PANELS = {
    "reward": "Mean reward of a round",
    "mismatch_k3": "k3 between engine and trainer",
    "routers_changed": "Share of routers that would differ",
}
PHASES = {  # in the order of a round: what the run calls it -> (what it is, colour)
    "sample_s": ("sampling", "#56B4E9"),
    "score_s": ("rewards", "#CC79A7"),
    "train_s": ("training", "#009E73"),
    "weights_s": ("weights written", "#E69F00"),
    "own_answers_s": ("trainer's probe answers", "#F0E442"),
    "load_s": ("weights loaded, probe compared", "#999999"),
}


def write_figure(rounds: dict[str, list[dict[str, Any]]], file: Path) -> None:
    figure = Figure(figsize=(13, 3.6), dpi=150, facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(PANELS) + 1)
    for axes, (name, title) in zip(panels, PANELS.items(), strict=False):
        for arm, found in rounds.items():
            color, marker = STYLES[arm]
            values = [(number, one[name]) for number, one in enumerate(found, start=1) if name in one]
            if values:
                axes.plot(*zip(*values, strict=True), color=color, marker=marker, markersize=4, label=arm)
        finish_axes(axes, title, "round")
        axes.set_xlim(left=0)
        if name == "mismatch_k3":
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
            axes.ticklabel_format(axis="y", scilimits=(-3, 3))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    draw_seconds(panels[-1], rounds)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), frameon=False, fontsize=9)
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels) // 2, frameon=False, fontsize=8)
    figure.savefig(file)


def draw_seconds(axes: Axes, rounds: dict[str, list[dict[str, Any]]]) -> None:
    """A bar for each arm: the mean seconds of its rounds, by phase."""
    left = dict.fromkeys(rounds, 0.0)
    for phase, (what, color) in PHASES.items():
        means = {arm: mean_seconds(found, phase) for arm, found in rounds.items()}
        axes.barh(list(means), list(means.values()), left=list(left.values()), color=color, label=what, height=0.5)
        left = {arm: left[arm] + seconds for arm, seconds in means.items()}
    finish_axes(axes, "Seconds of a round, by phase", "s")
    axes.grid(False)
    axes.set_ylim(len(rounds) - 0.4, -0.6)


def mean_seconds(found: list[dict[str, Any]], phase: str) -> float:
    """Over the rounds but the first, in which the engine starts, and the last, whose training ends with the run."""
    whole = found[1:-1] or found
    return sum(one["seconds"].get(phase, 0.0) for one in whole) / len(whole)
