"""Muon against AdamW at equal steps: the language model of tools/bench/balance, learning rate by learning rate.

    python -m tools.bench.optimizers.bench --seeds 0 --steps 100        a first look
    python -m tools.bench.optimizers.bench --show FILE                  print an earlier result

A Qwen3-MoE (3 layers, 16 experts, top-2, loss-free balancing) learns the bytes of Python's standard library, on 2
processes, by the trainer's own step. Both optimizers get as many learning rates, of which the first seed chooses one
for the others.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ds_moe.engine.cpu import cpu_settings
from tools.bench.balance.bench import RANKS, TERMS
from tools.bench.launched import run_plan
from tools.results import Claim, command_line, judged, markdown, print_claims, spread, spread_text, write_json

LR = 3e-3  # of AdamW beside Muon, the balance benchmark's
METHODS: dict[str, dict[str, Any]] = {
    **{f"adamw {lr:g}": {"lr": lr} for lr in (1e-3, 3e-3, 1e-2)},
    **{f"muon {lr:g}": {"optimizer": "muon", "lr": LR, "muon_lr": lr} for lr in (3e-3, 1e-2, 3e-2)},
}
EVALUATIONS = 5


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.show:
        result = json.loads(options.show.read_text())
    else:
        result = measure(options)
    result["summary"] = summarize(result["runs"])
    result["claims"] = claims(result["summary"])
    print_result(result)
    write_json(result, options.json)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, "--suite", "--json", "--show")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a run (default %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps must be at least 2")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every method with the first seed, then each optimizer's best one with the others."""
    result = _run(make_plan(options, options.methods, options.seeds[:1]))
    if others := options.seeds[1:]:
        summary = summarize(result["runs"])
        chosen = [name for name in (best(summary, "adamw"), best(summary, "muon")) if name]
        write_json(result, options.json)  # what is done, in case that the rest is not
        more = _run(make_plan(options, chosen, others))
        result |= {"seeds": options.seeds, "seconds": result["seconds"] + more["seconds"]}
        result["runs"] += more["runs"]
    return result


def _run(plan: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return run_plan("tools.bench.balance.ranks", plan, RANKS, cpu_settings(RANKS), Path(folder))


def make_plan(options: argparse.Namespace, methods: Sequence[str], seeds: list[int]) -> dict[str, Any]:
    return {
        "seeds": seeds,
        "steps": options.steps,
        "ep_size": RANKS,
        "evaluate_at": sorted({*np.linspace(0, options.steps, EVALUATIONS + 1).astype(int).tolist()[1:]} - {0}),
        "methods": {name: [TERMS["loss_free"]] for name in methods},
        "train_of": {name: METHODS[name] for name in methods},
    }


def summarize(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per method: held-out loss of every seed at every evaluated step, MaxVio at the last, seconds a step."""
    summary: dict[str, dict[str, Any]] = {}
    for run in runs:
        points = run["points"]
        mine = summary.setdefault(
            run["method"], {"steps": [point["step"] for point in points], "loss": [], "max_vio": [], "step_s": []}
        )
        mine["loss"].append([point["loss"] for point in points])
        mine["max_vio"].append(float(np.mean(points[-1]["max_vio_L"])))
        mine["step_s"].append(run["train_s"] / points[-1]["step"])
    return summary


def last(figures: dict[str, Any]) -> list[float]:
    return [losses[-1] for losses in figures["loss"]]


def best(summary: dict[str, dict[str, Any]], optimizer: str) -> str | None:
    """The learning rate of an optimizer with the lowest held-out loss at the last step, by the first seed."""
    names = [name for name in summary if name.startswith(optimizer)]
    return min(names, key=lambda name: last(summary[name])[0], default=None)


def claims(summary: dict[str, dict[str, Any]]) -> list[Claim]:
    """At each optimizer's best learning rate of those tried; only what these methods and seeds can tell."""
    theirs, ours = best(summary, "adamw"), best(summary, "muon")
    if theirs is None or ours is None:
        return []
    adamw, muon = summary[theirs], summary[ours]
    both = f"{statistics.mean(last(muon)):.4f} ({ours}) against {statistics.mean(last(adamw)):.4f} ({theirs})"
    every = all(mine < other for mine, other in zip(last(muon), last(adamw), strict=True))
    found = [
        (f"held-out loss at equal steps, each at its best learning rate: {both}, lower by muon in every seed", every)
    ]
    reached = next(
        (
            step
            for step, losses in zip(muon["steps"], zip(*muon["loss"], strict=True), strict=True)
            if statistics.mean(losses) <= statistics.mean(last(adamw))
        ),
        None,
    )
    if reached is not None:
        share = reached / adamw["steps"][-1]
        found.append((f"muon is at AdamW's last loss after {reached} steps, {share:.0%} of them", share < 1))
    worst = max(map(spread, (last(muon), last(adamw))), key=lambda one: one or 0.0)
    if worst is not None:
        gap = statistics.mean(last(adamw)) - statistics.mean(last(muon))
        found.append((f"the gap, {gap:.4f}, is larger than the seeds' spread, {worst:.4f}", gap > worst))
    return judged(found)


def print_result(result: dict[str, Any]) -> None:
    summary = result["summary"]
    print(
        f"\n{result['steps']} steps, seeds {result['seeds']}, mean ± standard deviation over seeds; "
        f"{result['seconds'] / 60:.1f} minutes on {result['cores']} cores"
    )
    rows = [
        [
            name,
            str(len(figures["loss"])),
            spread_text([losses[len(losses) // 2] for losses in figures["loss"]], ".4f"),
            spread_text(last(figures), ".4f"),
            f"{statistics.mean(figures['max_vio']):.2f}",
            f"{statistics.mean(figures['step_s']):.3f}",
        ]
        for name, figures in summary.items()
    ]
    print(
        f"\n{markdown('optimizer, lr | seeds | held-out loss after 3/5 | at the end | MaxVio_global | s/step', rows)}\n"
    )
    print_claims(result["claims"])


if __name__ == "__main__":
    sys.exit(main())
