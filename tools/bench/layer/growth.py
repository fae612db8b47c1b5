"""How time and saved memory of a layer grow with tokens, experts and top-k: ours against its rival."""

import itertools
import statistics
import sys
from typing import Any

import numpy as np
from rich.table import Table

from tools.bench.layer.block import Case, Shape, Suite, draw_weights, routed_input
from tools.bench.layer.contenders import DEFAULT, RIVAL, contenders
from tools.bench.layer.measure import difference, interleaved, memory_bandwidth, results, saved_bytes
from tools.results import new_table

NAMES = {"T": "tokens", "E": "experts", "K": "experts a token"}


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
