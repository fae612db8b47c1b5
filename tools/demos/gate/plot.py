"""The figure of gate_demo: how often the right adapter is found, and what that is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ds_moe.monitor.plot import finish_axes

OURS, BOUND, OTHERS = "#0072B2", "#009E73", "#BBBBBB"  # Okabe & Ito's blue and green, and grey


def write_figure(result: dict[str, Any], file: Path) -> None:
    """PNG of routing accuracies and of the answers that each choice of adapters gets right."""
    routing = result["routing"]
    chosen = {"text and screen": routing["accuracy"]}
    chosen |= {name: routing["baselines"][name] for name in ("text only", "vision only")}
    chosen |= {"first token": result["trap"]["accuracy"], "majority": routing["majority_accuracy"]}
    figure = Figure(figsize=(10, 3.3), dpi=150, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, "Right adapter found", chosen, {"text and screen": OURS})
    _bars(right, "Answers exactly right", result["answers"], {"routed": OURS, "oracle": BOUND})
    figure.savefig(file)


def _bars(axes: Axes, title: str, shares: dict[str, float], colors: dict[str, str]) -> None:
    names = list(shares)
    axes.barh(names, list(shares.values()), color=[colors.get(name, OTHERS) for name in names], height=0.7)
    for row, share in enumerate(shares.values()):
        axes.text(share + 0.01, row, f"{share:.1%}", va="center", fontsize=8.5)
    finish_axes(axes, title)
    axes.set_xlabel("share of the held-out requests", fontsize=9)
    axes.set_axisbelow(True)
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
