"""The figure of assemble_demo: held-out answers by kind of question and model."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ds_moe.monitor.plot import finish_axes

KINDS = {"digit": "which digit", "parity": "even or odd", "at_least_five": "at least five", "mean": "mean of the three"}
COLORS = ["#DDDDDD", "#E69F00", "#CC79A7", "#888888", "#56B4E9", "#0072B2"]  # Okabe & Ito's, and greys


def write_figure(accuracy: dict[str, dict[str, float]], file: Path) -> None:
    """PNG of `accuracy`: what a model is called -> kind of question -> share of answers exactly right."""
    figure = Figure(figsize=(10, 3.6), dpi=150, facecolor="white", layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(accuracy)
    for number, ((label, shares), color) in enumerate(zip(accuracy.items(), COLORS, strict=True)):
        places = [group + (number - (len(accuracy) - 1) / 2) * width for group in range(len(KINDS))]
        heights = [shares[kind] for kind in KINDS]
        axes.bar(places, heights, width * 0.92, color=color, label=label)
        for place, height in zip(places, heights, strict=True):
            axes.text(place, height + 0.012, f"{height:.2f}".lstrip("0"), ha="center", fontsize=7)
    finish_axes(axes, "Held-out answers exactly right")
    axes.set_axisbelow(True)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("")
    axes.set_xlim(-0.5, len(KINDS) - 0.5)
    axes.set_xticks(range(len(KINDS)), list(KINDS.values()), fontsize=9)
    axes.set_ylim(0, 1.08)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8.5)
    figure.savefig(file)
