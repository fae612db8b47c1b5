"""Draw the growth that the benchmark measured: time and saved memory over tokens, experts and top-k, log-log.

python -m tools.bench.layer.plot growth.json growth.png
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ds_moe.monitor.heatmap import FAINT, INK
from ds_moe.monitor.plot import finish_axes
from tools.bench.layer.growth import NAMES
from tools.results import command_line

STYLES = (("#0072B2", "o"), ("#D55E00", "s"))  # ours, its rival: Okabe & Ito's colours, and a marker
ROWS = {"median_s": ("Time, forward and backward", "ms", 1e3), "saved_bytes": ("Saved for backward", "MiB", 2**-20)}


def write_figure(growth: dict[str, Any], file: Path) -> None:
    """PNG of `growth` in the benchmark's JSON: a column an axis; time above, saved memory below."""
    sweeps = growth["axes"]
    figure = Figure(figsize=(4 * len(sweeps), 6.6), dpi=150, facecolor="white", layout="constrained")
    panels = figure.subplots(len(ROWS), len(sweeps), squeeze=False)
    for row, key in enumerate(ROWS):
        for column, (axis, sweep) in enumerate(sweeps.items()):
            draw(panels[row][column], axis, sweep, key)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def draw(axes: Axes, axis: str, sweep: dict[str, Any], key: str) -> None:
    """A line a contender with its slope; for time over experts also what the weights' own traffic takes."""
    title, unit, scale = ROWS[key]
    sizes, points = sweep["sizes"], sweep["points"]
    for (name, slopes), (color, marker) in zip(sweep["slopes"].items(), STYLES, strict=True):
        values = [scale * point["contenders"][name][key] for point in points]
        label = f"{name}: slope {slopes[key]:.2f}"
        axes.plot(sizes, values, color=color, marker=marker, markersize=4, linewidth=1.6, label=label)
        if key == "median_s":
            taken = [point["contenders"][name]["seconds"] for point in points]
            low, high = ([scale * pick(seconds) for seconds in taken] for pick in (min, max))
            axes.fill_between(sizes, low, high, color=color, alpha=0.2, linewidth=0)
    if key == "median_s" and axis == "E":
        traffic = [scale * point["weight_traffic_s"] for point in points]
        axes.plot(sizes, traffic, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), label="the weights' own traffic")
    fixed = ", ".join(f"{name} {value}" for name, value in points[0]["shape"].items() if name != axis)
    finish_axes(axes, f"{title}\n{fixed}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(sizes[0] / 1.15, sizes[-1] * 1.15)
    axes.set_xticks(sizes, [f"{size // 1024}k" if size >= 1024 else str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.1, high * (high / low) ** 0.3 * 1.2)  # the legend stands above the lines
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(f"{NAMES[axis]} {axis}", fontsize=9, color=INK)
    axes.set_ylabel(unit, fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=7.5, labelcolor=INK, loc="upper left")


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("json", type=Path, help="what tools.bench.layer.bench --growth --json wrote")
    parser.add_argument("png", type=Path, help="the picture to write")
    options = parser.parse_args(arguments)
    report = json.loads(options.json.read_text())
    if "growth" not in report:
        parser.error(f"{options.json} holds no growth: write it with tools.bench.layer.bench --growth --json")
    write_figure(report["growth"], options.png)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
