"""Time forward and backward of one MoE layer in one process: ours with each backend, transformers' own, and a roofline.

    python tools/bench_layer.py --suite cpu
    python tools/bench_layer.py --suite cpu --shape B --routing zipf --repeats 9 --json bench.json

The roofline is one dense SwiGLU over as many rows: the same FLOPs in the largest possible products, without routing.
All contenders get the same weights, input and routing; one whose output or gradients differ from transformers' eager
layer is not timed. Repetitions are interleaved, so that a busy machine slows all alike; speeds are ratios of medians.
Routing: uniform; zipf (expert i is drawn in proportion to 1 / (i + 1)); one_hot (all tokens choose the same experts).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ds_moe.config import ExpertsConfig, MoEConfig
from ds_moe.models.convert import convert
from ds_moe.moe.backends import BACKENDS

EAGER, RIVAL, ROOFLINE = "transformers eager", "transformers grouped_mm", "dense SwiGLU (roofline)"
SPEEDS = {"speed_to_rival": RIVAL, "speed_to_roofline": ROOFLINE}
ROUTINGS = ("uniform", "zipf", "one_hot")


class Shape(NamedTuple):
    """T tokens of width D choose K of E SwiGLU experts of width F: T * K rows."""

    T: int
    D: int
    F: int
    E: int
    K: int


class Suite(NamedTuple):
    device: str
    dtype: torch.dtype
    tolerance: float  # largest difference to the eager layer, relative to the largest value of its tensor
    shapes: dict[str, Shape]


CPU_SHAPES = {"A": Shape(1024, 512, 512, 8, 2), "B": Shape(2048, 512, 256, 64, 2), "C": Shape(4096, 1024, 512, 32, 2)}
SUITES = {
    "smoke": Suite("cpu", torch.float32, 1e-4, {"tiny": Shape(64, 64, 48, 4, 2)}),
    "cpu": Suite("cpu", torch.float32, 1e-4, CPU_SHAPES),
    # bf16: the eager layer rounds each of the K terms of a token, others their sum.
    "cuda": Suite("cuda", torch.bfloat16, 3e-2, {"qwen3-vl-30b": Shape(32768, 2048, 768, 128, 8)}),
}


def moe_block(shape: Shape, suite: Suite, implementation: str, backend: str | None = None) -> nn.Module:
    """transformers' MoE block, or with a `backend` our layer in its place; the same weights in every call."""
    config = transformers.Qwen3MoeConfig(
        **{"vocab_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8},
        **{"hidden_size": shape.D, "moe_intermediate_size": shape.F, "num_experts": shape.E},
        **{"num_experts_per_tok": shape.K, "norm_topk_prob": True, "experts_implementation": implementation},
    )
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config)
    nn.init.orthogonal_(model.model.layers[0].mlp.gate.weight)  # for `routed_input`
    if backend is not None:
        convert(model, MoEConfig(experts=ExpertsConfig(backend=backend)))
    return model.model.layers[0].mlp.train().to(suite.device, suite.dtype)


class SwiGLU(nn.Module):
    def forward(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


def routed_input(shape: Shape, router_ED: Tensor, routing: str) -> Tensor:
    """(1, T, D) hidden states that a router of orthonormal rows sends where `routing` says: their logits are
    log-probabilities plus Gumbel noise, and the K largest of those are K draws without replacement."""
    generator = torch.Generator().manual_seed(1)
    rank_E = torch.arange(shape.E)
    zipf_E, one_hot_E = 1 / (rank_E + 1), torch.where(rank_E < shape.K, 1.0, 1e-30)
    chance_E = {"uniform": torch.ones(shape.E), "zipf": zipf_E, "one_hot": one_hot_E}[routing]
    wanted_TE = chance_E.log() - torch.empty(shape.T, shape.E).exponential_(generator=generator).log()
    x_TD = torch.randn(shape.T, shape.D, generator=generator)
    router_ED = router_ED.detach().cpu().float()
    return (x_TD + (wanted_TE - x_TD @ router_ED.T) @ router_ED).unsqueeze(0)


def forward_backward(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of half its sum of squares in the input and every weight."""
    y = module(x)
    return (y, *torch.autograd.grad(y, [x, *module.parameters()], y.detach()))


def difference(module: nn.Module, x: Tensor, expected: tuple[Tensor, ...]) -> float:
    pairs = zip(forward_backward(module, x), expected, strict=True)
    worst = [(ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30) for ours, theirs in pairs]
    return torch.stack(worst).max().item()  # NaN if any is


def seconds(run: Callable[[], object], device: str) -> float:
    if device == "cpu":
        began_s = time.perf_counter()
        run()
        return time.perf_counter() - began_s
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3


def measure(name: str, suite: Suite, routing: str, repeats: int) -> list[dict]:
    """One result a contender, without times where it differs from the eager layer."""
    shape = suite.shapes[name]
    blocks = {EAGER: moe_block(shape, suite, "eager"), RIVAL: moe_block(shape, suite, "grouped_mm")}
    blocks |= {f"ds_moe {backend}": moe_block(shape, suite, "eager", backend) for backend in BACKENDS}
    x = routed_input(shape, blocks[EAGER].gate.weight, routing).to(suite.device, suite.dtype).requires_grad_()
    expected = forward_backward(blocks[EAGER], x)
    differences = {contender: difference(block, x, expected) for contender, block in blocks.items()}
    del expected

    matrices = nn.Linear(shape.D, 2 * shape.F, bias=False), nn.Linear(shape.F, shape.D, bias=False)
    dense = nn.Sequential(matrices[0], SwiGLU(), matrices[1]).to(suite.device, suite.dtype)
    rows_RD = torch.randn(shape.T * shape.K, shape.D).to(suite.device, suite.dtype).requires_grad_()
    runs = {ROOFLINE: (dense, rows_RD)}
    runs |= {contender: (block, x) for contender, block in blocks.items() if differences[contender] <= suite.tolerance}
    times: dict[str, list[float]] = {contender: [] for contender in runs}
    for repeat in range(repeats + 1):  # the first one warms up
        for contender, (block, given) in runs.items():
            taken_s = seconds(lambda block=block, given=given: forward_backward(block, given), suite.device)
            times[contender] += [taken_s] if repeat else []

    median_s = {contender: statistics.median(taken) for contender, taken in times.items()}
    results = []
    for contender in (ROOFLINE, *blocks):
        result = {"shape": name, "routing": routing, "contender": contender, "difference": differences.get(contender)}
        if own_s := median_s.get(contender):
            speeds = {key: median_s.get(to, math.nan) / own_s for key, to in SPEEDS.items()}
            result |= {"median_s": own_s, "min_s": min(times[contender]), "max_s": max(times[contender]), **speeds}
        results.append(result)
    return results


def table(results: list[dict]) -> Table:
    table = Table("shape", "routing", "contender")
    for column in ("median ms", "min - max", f"speed to\n{RIVAL}", "speed to\nroofline", "difference\nto eager"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        cells = ["wrong, not timed", "", "", ""]
        if "median_s" in result:
            median, low, high = (f"{result[key] * 1e3:.1f}" for key in ("median_s", "min_s", "max_s"))
            cells = [median, f"{low} - {high}", *(f"{result[key]:.2f}" for key in SPEEDS)]
        differs = "" if result["difference"] is None else f"{result['difference']:.0e}"
        table.add_row(result["shape"], result["routing"], result["contender"], *cells, differs)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="cpu", help="cpu and smoke: fp32; cuda: bf16 (default cpu)")
    parser.add_argument("--shape", action="append", metavar="NAME", help="only this shape of the suite (repeatable)")
    parser.add_argument("--routing", action="append", choices=ROUTINGS, help="only this routing (repeatable)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions after a warm-up (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write figures, shapes and versions here")
    options = parser.parse_args()
    suite = SUITES[options.suite]
    if unknown := set(options.shape or ()) - set(suite.shapes):
        parser.error(f"--shape {min(unknown)}: suite {options.suite} has {', '.join(suite.shapes)}")
    if min(options.repeats, options.threads) < 1:
        parser.error("--repeats and --threads must be at least 1")
    if suite.device == "cuda" and not torch.cuda.is_available():
        parser.error("--suite cuda needs a CUDA device")

    torch.set_num_threads(options.threads)
    names, routings = options.shape or list(suite.shapes), options.routing or ROUTINGS
    results: list[dict] = []
    for name, routing in itertools.product(names, routings):
        print(f"measuring shape {name}, routing {routing}", file=sys.stderr, flush=True)
        results += measure(name, suite, routing, options.repeats)
    environment = {
        **{"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()},
        "dtype": str(suite.dtype),
        "device": torch.cuda.get_device_name() if suite.device == "cuda" else "cpu",
        "load_average": round(os.getloadavg()[0], 1),  # well above `threads`: other processes were running
        "malloc": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")},
    }
    shapes = {name: suite.shapes[name]._asdict() for name in names}
    facts = {"suite": options.suite, "repeats": options.repeats, "environment": environment, "shapes": shapes}
    console = Console(width=None if sys.stdout.isatty() else 140)  # no wrapped columns in a log file
    console.print(facts, table(results))
    if options.json:
        options.json.write_text(json.dumps({**facts, "results": results}, indent=1))
    if wrong := sorted({result["contender"] for result in results if "median_s" not in result}):
        print(f"error: results differ from {EAGER} by more than {suite.tolerance}: {wrong}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
