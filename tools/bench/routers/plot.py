"""Draw the load of every router on the same random, skewed hidden states, before any training.

python -m tools.bench.routers.plot --out docs/images/routers.png
python -m tools.bench.routers.plot --json loads.json       # {router: load of each expert in fair shares}
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from ds_moe.moe.decision import RoutingDecision
from ds_moe.moe.loss_free import LossFreeBalancing
from ds_moe.moe.parts import make_router
from ds_moe.moe.routers import Router
from ds_moe.monitor.heatmap import FAINT, INK
from ds_moe.monitor.meters import max_vio, relative_load
from tools.results import command_line, save, write_json

T, D, E, K = 8192, 64, 16, 2
BIAS_STEPS = 600
BLUE, GREEN, GREY = "#0072B2", "#009E73", "#9AA0A6"  # tokens choose, experts choose, nothing is learned
ROUTES: dict[str, dict[str, Any]] = {  # kind of router, and what is said of it: its settings
    "topk": {},
    "topk, loss-free": {},
    "topk, 2 of 4 groups": {"groups": 4, "top_groups": 2},
    "topk, capacity 1.25": {"capacity_factor": 1.25},
    **{kind: {} for kind in ("noisy_topk", "expert_choice", "hash", "balanced")},
}


def route(name: str) -> RoutingDecision:
    generator = torch.Generator().manual_seed(0)
    # What all tokens share, beside what is each token's own, is what makes some experts popular.
    common_D, own_TD = torch.randn(D, generator=generator), torch.randn(T, D, generator=generator)
    x_TD = 0.5 * common_D + own_TD
    weight_ED = nn.Parameter(torch.randn(E, D, generator=generator) * D**-0.5)
    torch.manual_seed(0)
    router = make_router(name.partition(",")[0], weight_ED, K, **ROUTES[name]).train()
    with torch.no_grad():
        if "loss-free" in name:
            balance(router, x_TD)
        return router(x_TD)


def balance(router: Router, x_TD: torch.Tensor) -> None:
    router.balancing = LossFreeBalancing(E, decay_from=0.5)
    for step in range(BIAS_STEPS):
        router.balancing.add(torch.bincount(router(x_TD).expert_N, minlength=E))
        router.balancing.update(progress=step / BIAS_STEPS)


def draw(axes: Axes, name: str, decision: RoutingDecision) -> np.ndarray:
    counts_1E = torch.bincount(decision.expert_N, minlength=E)[None].numpy()
    load_E = counts_1E[0] * E / (T * K)  # in fair shares of what all tokens ask for
    color = GREEN if name == "expert_choice" else GREY if name in ("hash", "balanced") else BLUE
    axes.bar(range(E), load_E, color=color, width=0.8)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    uncovered = 1 - decision.token_N.unique().numel() / T
    facts = [f"MaxVio {max_vio(counts_1E):.2f}"]
    facts += [f"{decision.dropped / (T * K):.0%} dropped"] if decision.dropped else []
    facts += [f"{uncovered:.0%} uncovered"] if uncovered else []
    axes.set_title(name, color=INK, fontsize=10, loc="left", fontweight="bold", pad=16)
    axes.text(0, 1.02, ", ".join(facts), transform=axes.transAxes, color=INK, fontsize=8)
    axes.set_xticks([0, E // 2 - 1, E - 1], ["1", str(E // 2), str(E)], fontsize=8)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.5, alpha=0.35)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    return relative_load(counts_1E)[0]


def main() -> int:
    parser = command_line(__doc__, "--json")
    parser.add_argument("--out", type=Path, default=Path("docs/images/routers.png"))
    options = parser.parse_args()
    figure = Figure(figsize=(10.4, 5.2), dpi=120, layout="constrained")
    panels = figure.subplots(2, 4, sharex=True, sharey=True)
    loads = {name: draw(axes, name, route(name)) for name, axes in zip(ROUTES, panels.flat, strict=True)}
    for axes in panels[:, 0]:
        axes.set_ylabel("load, fair shares", color=INK, fontsize=9)
    for axes in panels[1]:
        axes.set_xlabel("expert", color=INK, fontsize=9)
    title = f"Load of {E} experts, top-{K}, {T:,} random tokens with a common direction, untrained"
    figure.suptitle(title, color=INK, fontsize=10)
    save(figure, options.out)
    write_json({name: load_E.tolist() for name, load_E in loads.items()}, options.json, indent=1)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
