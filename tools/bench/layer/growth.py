"""How time and saved memory of a layer grow with tokens, experts and top-k: ours against its rival."""

import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.table import Table

from ds_moe.monitor.heatmap import FAINT, INK
from ds_moe.monitor.plot import finish_axes
from tools.bench.layer.block import Case, Shape, Suite, draw_weights, routed_input
from tools.bench.layer.contenders import DEFAULT, RIVAL, contenders
from tools.bench.layer.measure import difference, interleaved, memory_bandwidth, results, saved_bytes
from tools.results import new_table, save

NAMES = {"T": "tokens", "E": "experts", "K": "experts a token"}
STYLES = (("#0072B2", "o"), ("#D55E00", "s"))  # ours, its rival: Okabe & Ito's colours, and a marker
ROWS = {"median_s": ("Time, forward and backward", "ms", 1e3), "saved_bytes": ("Saved for backward", "MiB", 2**-20)}


def slope(sizes: list[float], values: list[float]) -> float:
    """Exponent b of the power law `values = a * sizes ** b` that fits best: least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def grow(suite: Suite, repeats: int) -> dict[str, Any]:
    """Points of every sweep and the slopes through them, with uniform routing.

    `weight_traffic_s` of a point is what memory alone takes for the experts' weights: both passes read them once and
    the backward writes their gradient, at the bandwidth of a copy.
    """
    bandwidth = memory_bandwidth(suite.device)
    growth: dict[str, Any] = {"bytes_per_s": bandwidth, "axes": {}}
    for axis, shapes in suite.growth.items():
        points = []
        for shape in shapes:
            print(f"measuring {axis} = {getattr(shape, axis)}", file=sys.stderr, flush=True)
            weight_bytes = 3 * shape.E * shape.D * shape.F * suite.dtype.itemsize
            points.append(point(shape, suite, repeats) | {"weight_traffic_s": 3 * weight_bytes / bandwidth})
        sizes = [getattr(shape, axis) for shape in shapes]
        slopes: dict[str, dict[str, float]] = {DEFAULT: {}, RIVAL: {}}
        for name, key in itertools.product(slopes, ("median_s", "saved_bytes")):
            slopes[name][key] = slope(sizes, [one["contenders"][name][key] for one in points])
        growth["axes"][axis] = {"sizes": sizes, "points": points, "slopes": slopes}
    return growth


def point(shape: Shape, suite: Suite, repeats: int) -> dict[str, Any]:
    weights = draw_weights(shape, suite)
    x = routed_input(shape, weights.router_ED, "uniform")
    blocks = {name: contenders()[name](Case(shape, weights, shape.T)) for name in (DEFAULT, RIVAL)}
    found = difference(*(results(block, x) for block in blocks.values()))
    if not found <= suite.tolerance:
        raise ArithmeticError(f"{DEFAULT} differs from {RIVAL} by {found:.0e} at {shape}")
    times = interleaved({name: (block, x) for name, block in blocks.items()}, suite.device, repeats)
    figures = {}
    for name, block in blocks.items():
        median_s = statistics.median(times[name])
        figures[name] = {"seconds": times[name], "median_s": median_s, "saved_bytes": saved_bytes(block, x)}
    return {"shape": shape._asdict(), "difference": found, "contenders": figures}


def growth_tables(growth: dict[str, Any]) -> list[Table]:
    tables = []
    for axis, sweep in growth["axes"].items():
        base = {key: value for key, value in sweep["points"][0]["shape"].items() if key != axis}
        columns = [column for name in (DEFAULT, RIVAL) for column in (f"{name}\nms", "\nsaved MiB")]
        title = f"{NAMES[axis]} ({', '.join(f'{key} {value}' for key, value in base.items())})"
        table = new_table([axis], [*columns, "weights' own\ntraffic, ms"], title)
        for size, one in zip(sweep["sizes"], sweep["points"], strict=True):
            cells = []
            for figures in one["contenders"].values():
                cells += [f"{figures['median_s'] * 1e3:.1f}", f"{figures['saved_bytes'] / 2**20:.3g}"]
            table.add_row(str(size), *cells, f"{one['weight_traffic_s'] * 1e3:.1f}")
        slopes = [f"{value:.2f}" for one in sweep["slopes"].values() for value in one.values()]
        table.add_row("slope", *slopes, "", style="bold")
        tables.append(table)
    return tables


def write_figure(growth: dict[str, Any], file: Path) -> None:
    """PNG of `growth` in the benchmark's JSON: a column an axis; time above, saved memory below."""
    sweeps = growth["axes"]
    figure = Figure(figsize=(4 * len(sweeps), 6.6), dpi=150, facecolor="white", layout="constrained")
    panels = figure.subplots(len(ROWS), len(sweeps), squeeze=False)
    for row, key in enumerate(ROWS):
        for column, (axis, sweep) in enumerate(sweeps.items()):
            draw(panels[row][column], axis, sweep, key)
    save(figure, file)


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
    finish_axes(axes, f"{title}\n{fixed}", f"{NAMES[axis]} {axis}")
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
    axes.set_ylabel(unit, fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=7.5, labelcolor=INK, loc="upper left")
