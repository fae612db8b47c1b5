"""Draw a scan: what the length of a packed row costs, and the padded contenders beside it."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ds_moe.monitor.heatmap import INK
from ds_moe.monitor.plot import finish_axes
from tools.results import save

COLOURS = {"packed": "#0072B2", "padded": "#56B4E9", "before": "#D55E00", "zero3": "#009E73", "autoep": "#CC79A7"}
NAMES = {"padded": "padded", "before": "earlier build", "zero3": "ZeRO-3 + transformers", "autoep": "AutoEP"}
MIB = 2**20


def draw(found: dict[str, Any], file: Path) -> None:
    """Tokens a second and peak memory over N; of each padded contender its quickest setting, as a line across."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    panel(speed, found["scan"], "median", 1, "real tokens a second")
    panel(memory, found["scan"], "peak_bytes", MIB, "peak memory of a rank, MiB")
    figure.suptitle(f"Packed rows of at most N tokens, {found['batch']} samples a step", color=INK, fontsize=10)
    save(figure, file)


def panel(axes: Axes, scan: list[dict[str, Any]], key: str, unit: float, label: str) -> None:
    right = [one for one in scan if one["problem"] is None]
    packed = sorted((one for one in right if one["contender"] == "packed"), key=lambda one: one["size"])
    sizes, values = [one["size"] for one in packed], [one[key] / unit for one in packed]
    axes.plot(sizes, values, marker="o", color=COLOURS["packed"])
    if key == "median":
        axes.fill_between(
            sizes, [one["min"] for one in packed], [one["max"] for one in packed], color=COLOURS["packed"], alpha=0.15
        )
    for name, title in NAMES.items():
        if its := [one for one in right if one["contender"] == name]:
            best = max(its, key=lambda one: one["median"])
            axes.axhline(best[key] / unit, color=COLOURS[name], linestyle="--", linewidth=1)
            text = f"{title}, micro-batch {best['size']}"
            axes.annotate(text, (sizes[0], best[key] / unit), va="bottom", fontsize=7.5, color=COLOURS[name])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    finish_axes(axes, label, "N, tokens")
