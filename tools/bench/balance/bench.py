"""Does loss-free balancing balance, and what does it cost? A small MoE language model on real text, method by method.

    python -m tools.bench.balance.bench --seeds 0 --steps 150       a first look (all: about 20 minutes on 2 cores)
    python -m tools.bench.balance.bench --show FILE --plot FILE     print and draw an earlier result

A Qwen3-MoE (3 layers, 16 experts, top-2) learns the bytes of Python's standard library, on 2 processes, by the
trainer's own step. MaxVio_global is the fullest expert's load over the mean, minus 1, over the whole held-out set (Wang
et al. 2024, arXiv 2408.15664).
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ds_moe.engine.cpu import cpu_settings
from ds_moe.monitor.heatmap import FAINT, INK
from ds_moe.monitor.plot import finish_axes
from tools.bench.launched import run_plan
from tools.results import (
    Claim,
    command_line,
    judged,
    markdown,
    print_claims,
    save_with_legend,
    spread,
    spread_text,
    write_json,
)

METHODS = ("none", "aux", "loss_free", "aux+loss_free")
TERMS = {  # of a run file's moe.balance; Switch's weight
    "aux": {"kind": "aux", "weight": 0.01},
    "loss_free": {"kind": "loss_free", "update_rate": 0.005, "decay_from": 0.8},
}
RANKS = 2
EVALUATIONS = 10  # evenly spaced, beside one after the first step
TARGET, TARGET_RATIO = 0.20, 0.10  # MaxVio_global of loss_free: at most, and at most this share of none's
STARVED = 0.1  # of the fair share
STYLES = {  # Okabe & Ito's colours, and a marker for those who see none
    "none": ("#D55E00", "s"),
    "aux": ("#E69F00", "^"),
    "loss_free": ("#0072B2", "o"),
    "aux+loss_free": ("#009E73", "D"),
}
SMALL = {"fontsize": 7.5, "color": INK}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.show:
        result = json.loads(options.show.read_text())
    else:
        plan = make_plan(options)
        with tempfile.TemporaryDirectory() as folder:  # --json holds the result of the runs that are done, all along
            settings = cpu_settings(RANKS)
            result = run_plan("tools.bench.balance.ranks", plan, RANKS, settings, Path(folder), options.json)
    result["summary"] = summarize(result)
    result["claims"] = claims(result["summary"])
    print_result(result)
    write_json(result, options.json)
    if options.plot:
        write_figure(result, options.plot)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, "--suite", "--json", "--plot", "--show")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of a run (default %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps must be at least 2")
    return options


def make_plan(options: argparse.Namespace) -> dict[str, Any]:
    """What the ranks are told: every method as the `moe.balance` list of a run file."""
    return {
        "seeds": options.seeds,
        "steps": options.steps,
        "ep_size": RANKS,
        "evaluate_at": sorted({1, *np.linspace(0, options.steps, EVALUATIONS + 1).astype(int).tolist()[1:]} - {0}),
        "methods": {name: [TERMS[term] for term in name.split("+") if term != "none"] for name in options.methods},
    }


def summarize(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Per method, at the last step: each figure of every seed; MaxVio is the mean over layers."""
    summary: dict[str, dict[str, Any]] = {}
    for run in result["runs"]:
        last = run["points"][-1]
        share_LE = np.array(last["counts_LE"]) / np.mean(last["counts_LE"], axis=1, keepdims=True)
        figures = {
            "max_vio": float(np.mean(last["max_vio_L"])),
            "max_vio_L": last["max_vio_L"],
            "loss": last["loss"],
            "dead": int((share_LE == 0).sum()),
            "starved": int((share_LE < STARVED).sum()),
            "step_s": run["train_s"] / last["step"],
        }
        by_seed = summary.setdefault(run["method"], {key: [] for key in figures})
        for key, value in figures.items():
            by_seed[key].append(value)
    return summary


def claims(summary: dict[str, dict[str, Any]]) -> list[Claim]:
    """What loss-free balancing promises; only what these methods and seeds can tell."""
    if "loss_free" not in summary:
        return []
    ours = summary["loss_free"]
    vio = statistics.mean(ours["max_vio"])
    found = [(f"MaxVio_global of loss_free, {vio:.3f}, is at most {TARGET:.2f}", vio <= TARGET)]
    if "none" in summary:
        limit = TARGET_RATIO * statistics.mean(summary["none"]["max_vio"])
        found.append((f"it is at most 1/10 of none's, {limit:.3f}", vio <= limit))
    if "aux" in summary:
        aux = summary["aux"]
        theirs, loss, aux_loss = (statistics.mean(x) for x in (aux["max_vio"], ours["loss"], aux["loss"]))
        found.append((f"it is below aux's, {theirs:.3f}", vio < theirs))
        if len(ours["loss"]) > 1:
            worst = max(spread(ours["loss"]), spread(aux["loss"]))
            text = f"its held-out loss, {loss:.4f}, is at most aux's, {aux_loss:.4f}, plus the seeds' spread"
            found.append((f"{text}, {worst:.4f}", loss <= aux_loss + worst))
    return judged(found)


def print_result(result: dict[str, Any]) -> None:
    summary = result["summary"]
    seeds = len(next(iter(summary.values()))["loss"])
    held_out = result["held_out_windows"] * result["train"]["sequence"]
    print(
        f"\n{result['steps']} steps, {seeds} seed(s), mean ± standard deviation over seeds; {held_out:,} bytes of "
        f"{result['text']['held_out_files']} held-out files; {result['seconds'] / 60:.1f} minutes on "
        f"{result['cores']} cores"
    )
    rows = []
    none = statistics.mean(summary["none"]["max_vio"]) if "none" in summary else None
    for method, figures in summary.items():
        ratio = "-" if none is None else f"{statistics.mean(figures['max_vio']) / none:.1%}"
        layers = ", ".join(f"{vio:.2f}" for vio in np.mean(figures["max_vio_L"], axis=0))
        counted = [f"{statistics.mean(figures[key]):.1f}" for key in ("dead", "starved")]
        cells = [method, spread_text(figures["max_vio"], ".3f"), ratio, layers, spread_text(figures["loss"], ".4f")]
        rows.append([*cells, *counted, f"{statistics.mean(figures['step_s']):.3f}"])
    heads = "method | MaxVio_global | of none's | by layer | held-out loss | dead | starved | s/step"
    print(f"\n{markdown(heads, rows)}")
    print(f"dead: experts of all layers with no held-out token; starved: below {STARVED:.0%} of the fair share")
    print()
    print_claims(result["claims"])


def write_figure(result: dict[str, Any], file: Path) -> None:
    figure = Figure(figsize=(12, 3.7), dpi=150, facecolor="white", layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1.15, 1.15, 1))
    draw_time(axes[0], result["runs"])
    draw_layers(axes[1], result["summary"])
    draw_loss(axes[2], result["summary"])
    save_with_legend(figure, file)


def draw_time(axes: Axes, runs: list[dict[str, Any]]) -> None:
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
    axes.axhline(TARGET, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(f"target {TARGET:g}", (0.01, TARGET), (0, 2), ("axes fraction", "data"), "offset points", **SMALL)
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
    finish_axes(axes, "MaxVio_global by layer, last step", "MoE layer")
    axes.set_axisbelow(True)
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
    finish_axes(axes, "Held-out loss, nats a byte, last step", "one mark a seed, joined by seed; bar: mean")
    axes.set_xticks(range(len(summary)), list(summary), fontsize=8.5)
    axes.set_xlim(-0.5, len(summary) - 0.5)
    axes.grid(visible=False, axis="x")


if __name__ == "__main__":
    sys.exit(main())
