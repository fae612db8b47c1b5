"""What the benchmark makes of its figures: the summary, the claims, the tables, the picture."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ds_moe.monitor.heatmap import FAINT, INK
from ds_moe.monitor.plot import finish_axes
from tools.results import Claim, judged, markdown, print_claims, save_with_legend, spread_text

STYLES = {"fp32": ("#0072B2", "o"), "bf16": ("#D55E00", "s")}  # Okabe & Ito's colours, and a marker
FILLED = {"Qwen3-VL-MoE": "full", "Qwen3-MoE": "none"}  # markers where both models stand in one panel
SMALL = {"fontsize": 7.5, "color": INK}
LIVE, COMPLETION, REPLAY, SHIFTED = "live", "completion only", "prompt + completion", "shifted by one"
SCALE = 2.0  # the router scale that the claims are about: at 1 replay leaves less, at 4 the limits are not met
LIMITS = {"fp32": 0.6, "bf16": 0.75}  # of live's k3, for prompt + completion
WORSE = 50  # times its k3: what a trace shifted by one row is to cost at least

Row = dict[str, Any]  # of a summary: one model, dtype of the trainer and router scale, figures of every seed


def summarize(runs: list[Row]) -> list[Row]:
    """Per model, dtype and router scale: the figures of every seed; those of `modes` by mode."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["model"], run["dtype"], run["scale"]), []).append(run)
    summary = []
    for (model, dtype, scale), mine in groups.items():
        row: dict[str, Any] = {"model": model, "dtype": dtype, "scale": scale, "seeds": [run["seed"] for run in mine]}
        row |= {key: [run[key] for run in mine] for key in ("routers", "tokens", "least_weight", "nats")}
        modes = mine[0]["modes"]
        row |= {key: {mode: [run["modes"][mode][key] for run in mine] for mode in modes} for key in modes[LIVE]}
        row["limit"] = LIMITS[dtype]
        row["of_live"] = statistics.mean(row["k3"][REPLAY]) / statistics.mean(row["k3"][LIVE])
        row["of_live_by_seed"] = [ours / live for ours, live in zip(row["k3"][REPLAY], row["k3"][LIVE], strict=True)]
        row["shifted_times"] = statistics.mean(row["k3"][SHIFTED]) / statistics.mean(row["k3"][REPLAY])
        summary.append(row)
    return summary


def claims(summary: list[Row]) -> list[Claim]:
    """What replay promises at router scale `SCALE`; means over seeds."""
    found = []
    for row in summary:
        if row["scale"] == SCALE:
            name, limit = f"{row['model']}, {row['dtype']} trainer", row["limit"]
            seeds = ", ".join(f"{ratio:.2f}" for ratio in row["of_live_by_seed"])
            text = f"{name}: k3 of {REPLAY} is {row['of_live']:.2f} of live's, at most {limit} (seeds: {seeds})"
            found.append((text, row["of_live"] <= limit))
            times = row["shifted_times"]
            found.append((f"{name}: {SHIFTED}, k3 is {times:.0f} times that, at least {WORSE}", times >= WORSE))
    return judged(found)


def print_result(result: dict[str, Any]) -> None:
    summary, mean = result["summary"], statistics.mean
    print(
        f"\n{result['layers']} layers, top-{result['top_k']} of {result['experts']} experts; "
        f"{len(summary[0]['seeds'])} seed(s) of {result['prompts']} prompts x {result['tokens']} completion tokens; "
        f"{result['seconds'] / 60:.1f} minutes on one thread"
    )
    by_mode, by_scale = [], []
    for row in summary:
        for mode, k3 in row["k3"].items() if row["scale"] == SCALE else ():
            cells = [row["model"], row["dtype"], mode, show(k3), f"{mean(k3) / mean(row['k3'][LIVE]):.2f}"]
            by_mode.append([*cells, f"{mean(row['large'][mode]):.2%}", f"{max(row['max'][mode]):.2f}"])
        above = "" if row["of_live"] <= row["limit"] else f", above {row['limit']}"
        shares = [f"{mean(row[key]):.1%}" for key in ("least_weight", "routers", "tokens")]
        cells = [row["model"], row["dtype"], f"{row['scale']:g}", *shares, show(row["k3"][LIVE])]
        by_scale.append([*cells, show(row["k3"][REPLAY]), f"{row['of_live']:.2f}{above}"])
    print(f"\nrouter scale {SCALE:g}\n")
    print(markdown("model | trainer | replayed | k3 | of live | off by 2x | largest abs(d)", by_mode))
    heads = "model | trainer | router scale | least weight | routers | tokens | k3 live | k3 replayed | of live"
    print(f"\n{markdown(heads, by_scale)}\nmean ± standard deviation over seeds")
    print("off by 2x: completion tokens whose probabilities differ twofold or more")
    print("least weight: of a token's last expert; routers, tokens: that differ between engine and live trainer\n")
    print_claims(result["claims"])


def show(values: list[float]) -> str:
    return spread_text(values, ".2e", ".1e")


def write_figure(summary: list[Row], file: Path) -> None:
    """PNG: k3 by mode for each model at one router scale, and what replay leaves at every scale."""
    figure = Figure(figsize=(12, 3.9), dpi=150, facecolor="white", layout="constrained")
    models = list(dict.fromkeys(row["model"] for row in summary))
    axes = figure.subplots(1, len(models) + 1, width_ratios=[1.2] * len(models) + [1])
    for panel, model in zip(axes, models, strict=False):
        finish_axes(panel, f"{model}: k3, engine to trainer", "replayed (a mark a seed; bar: mean)")
        draw_modes(panel, [row for row in summary if row["model"] == model and row["scale"] == SCALE])
    finish_axes(axes[-1], "k3 with replay, of k3 live", "router scale (weight of a token's last expert)")
    draw_scales(axes[-1], summary)
    for panel in axes:
        panel.grid(visible=False, axis="x")
    save_with_legend(figure, file)


def draw_modes(axes: Axes, rows: list[Row]) -> None:
    for position, row in enumerate(rows):
        color, marker = STYLES[row["dtype"]]
        for mode, k3_S in enumerate(row["k3"].values()):
            x = mode + (position - (len(rows) - 1) / 2) * 0.4
            label = f"{row['dtype']} trainer" if mode == 0 else None
            axes.plot([x] * len(k3_S), k3_S, marker, color=color, markersize=5, alpha=0.75, label=label)
            axes.hlines(np.mean(k3_S), x - 0.17, x + 0.17, color=color, linewidth=2)
            place, shift = ((x, max(k3_S)), 5) if position == 0 else ((x, min(k3_S)), -12)  # above, below
            number = f"{np.mean(k3_S):.1e}".replace("e-0", "e-").replace("e+00", "")
            axes.annotate(number, place, (0, shift), "data", "offset points", ha="center", **SMALL)
    if rows:
        axes.set_xticks(range(len(rows[0]["k3"])), [mode.replace(" ", "\n", 1) for mode in rows[0]["k3"]], fontsize=8)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.06, y=0.12)


def draw_scales(axes: Axes, summary: list[Row]) -> None:
    """One mark a seed, a line through the ratios of the means; filled and empty marks tell the models apart."""
    scales = sorted({row["scale"] for row in summary})
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in summary):
        mine = [row for row in summary if (row["model"], row["dtype"]) == (model, dtype)]
        (color, marker), fill = STYLES[dtype], FILLED[model]
        dashes = "-" if fill == "full" else (0, (4, 2))
        x = [scales.index(row["scale"]) for row in mine]
        axes.plot(x, [row["of_live"] for row in mine], color=color, linewidth=1.4, linestyle=dashes)
        for place, row in zip(x, mine, strict=True):
            ratios = row["of_live_by_seed"]
            axes.plot([place] * len(ratios), ratios, marker, color=color, fillstyle=fill, markersize=5)
    axes.axhline(1, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    weights = [np.mean([row["least_weight"] for row in summary if row["scale"] == scale]) for scale in scales]
    ticks = [f"{scale:g}\n({weight:.1%})" for scale, weight in zip(scales, weights, strict=True)]
    axes.set_xticks(range(len(scales)), ticks, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.12)
    filled, empty = (", ".join(name for name, fill in FILLED.items() if fill == kind) for kind in ("full", "none"))
    legend = f"filled: {filled}\nempty: {empty}"
    axes.annotate(legend, (0.02, 0.86), xycoords="axes fraction", va="top", fontsize=8, color=INK)
