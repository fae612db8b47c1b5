"""Time whole training steps, and measure their peak memory: ours against what DeepSpeed offers without us.

ds_moe    our converted model, experts spread over all processes, built as a run builds it
zero3     ZeRO-3 + transformers grouped_mm: the model as it is, each MoE block a ZeRO-3 leaf module
autoep    DeepSpeed AutoEP, experts spread over all processes

A step is forward, backward and AdamW of a Qwen3-MoE under ZeRO-3 on random tokens. Engines live in the same processes
and take turns; a step takes as long as its slowest rank. A contender is timed only if its loss and the norm of its
gradients are those of plain transformers. Peak memory is the largest rank's, in processes of the engine's own.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from ds_moe.engine.cpu import cpu_settings
from tools.bench.launched import run_plan
from tools.results import command_line, new_table, show, write_json

CONTENDERS = {"ds_moe": "ds_moe", "zero3": "ZeRO-3 + transformers grouped_mm", "autoep": "DeepSpeed AutoEP"}
OURS = "ds_moe"
MIB = 2**20


class Suite(NamedTuple):
    device: str
    dtype: str
    processes: int
    scaling: list[int]  # numbers of processes
    tokens: list[int]  # a rank and step
    sequence: int  # tokens
    loss_tolerance: float  # largest difference to plain transformers
    norm_tolerance: float  # the same of the gradients' norm, relative
    steps: int  # of a turn
    repeats: int  # turns of each contender
    model: dict[str, int]  # of a Qwen3MoeConfig


TINY = {
    **{"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
SMALL = {  # 77 million parameters, nearly all of them experts'; as in DeepSeek-V3, one expert of 32 is chosen
    **{"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 4},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
    **{"num_experts": 64, "num_experts_per_tok": 2, "moe_intermediate_size": 384},
}
HALF = SMALL | {"moe_intermediate_size": 192}  # 39 million parameters
QWEN = {  # the language model of Qwen3-VL-30B-A3B with 4 of 48 layers and a vocabulary that does not outweigh them
    **{"vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 4},
    **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
    **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
}
SUITES = {
    "smoke": Suite("cpu", "fp32", 2, [1, 2], [32, 64], 16, 1e-5, 1e-4, 1, 2, TINY),
    "cpu": Suite("cpu", "fp32", 2, [1, 2, 4], [256, 1024, 4096], 256, 1e-5, 1e-4, 3, 5, SMALL),
    "cpu-39m": Suite("cpu", "fp32", 2, [1, 2, 4], [256, 1024, 4096], 256, 1e-5, 1e-4, 3, 5, HALF),
    # bf16: contenders round the K terms of a token's sum, or the sum.
    "h100": Suite("cuda", "bf16", 8, [1, 2, 4, 8], [4096, 16384], 4096, 2e-2, 5e-2, 5, 5, QWEN),
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    suite = SUITES[options.suite]
    facts: dict[str, Any] = {
        "suite": options.suite,
        **{"sequence": suite.sequence, "steps": options.steps, "repeats": options.repeats, "model": suite.model},
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),  # well above 0: other processes were running
    }
    with tempfile.TemporaryDirectory() as folder:
        runs = measure(options, Path(folder))
    facts |= {"environment": runs[0]["environment"], "parameters": runs[0]["parameters"]}
    results = summarize([result for run in runs for result in run["results"]])
    tables = [scaling_table(results)] if options.scaling else [time_table(results)]
    if any("peak_bytes" in result for result in results):
        tables.append(memory_table(results))
    show(facts, *tables)
    if options.scaling and (most := max(suite.scaling)) > facts["cores"]:
        print(f"{most} processes of one thread each share {facts['cores']} cores: beyond that they take turns")
    write_json({**facts, "results": results}, options.json, indent=1)
    if wrong := sorted({result["contender"] for result in results if "median_s" not in result}):
        print(f"error: loss or gradients are not those of plain transformers: {wrong}", file=sys.stderr)
    return 1 if wrong else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, "--json")
    parser.add_argument("--suite", choices=SUITES, default="cpu", help="h100: bf16, others fp32 (default cpu)")
    parser.add_argument("--tokens", type=int, action="append", metavar="N", help="a rank and step (repeatable)")
    parser.add_argument("--contender", choices=CONTENDERS, action="append", help="only this one (repeatable)")
    parser.add_argument("--repeats", type=int, help="turns of each contender (default: the suite's)")
    parser.add_argument("--steps", type=int, help="timed steps of a turn (default: the suite's)")
    parser.add_argument("--offload", action="store_true", help="optimizer states in host memory: zero3_offload.json")
    parser.add_argument("--scaling", action="store_true", help="ds_moe alone, on more and more processes; times only")
    options = parser.parse_args(arguments)
    suite = SUITES[options.suite]
    options.tokens = options.tokens or suite.tokens
    options.repeats = suite.repeats if options.repeats is None else options.repeats
    options.steps = suite.steps if options.steps is None else options.steps
    if any(tokens < 1 or tokens % suite.sequence for tokens in options.tokens):
        parser.error(f"--tokens must be a multiple of {suite.sequence}, the sequence of suite {options.suite}")
    if min(options.repeats, options.steps) < 1:
        parser.error("--repeats and --steps must be at least 1")
    if options.scaling and options.contender:
        parser.error("--scaling measures the times of ds_moe only: leave out --contender")
    if suite.device == "cuda" and (found := torch.cuda.device_count()) < suite.processes:
        parser.error(f"--suite {options.suite} needs {suite.processes} CUDA devices, and there are {found}")
    options.contender = list(dict.fromkeys(options.contender or CONTENDERS))
    return options


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    suite = SUITES[options.suite]
    if options.scaling:
        return [launch(["time"], [OURS], processes, options, folder) for processes in suite.scaling]
    runs = [launch(["time"], options.contender, suite.processes, options, folder)]
    timed = {result["contender"] for result in runs[0]["results"] if "step_s" in result}
    right = [one for one in options.contender if one in timed]
    return runs + [launch(["memory"], [one], suite.processes, options, folder) for one in right]


def launch(
    what: list[str], contenders: list[str], processes: int, options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """What the ranks find, one thread each: of `what`, "time" or "memory" or both, one after the other."""
    suite = SUITES[options.suite]
    plan = {"measure": what, "contenders": contenders, "processes": processes, "tokens": options.tokens}
    plan |= {"steps": options.steps, "repeats": options.repeats, "zero": "3_offload" if options.offload else 3}
    plan |= {key: getattr(suite, key) for key in ("dtype", "sequence", "loss_tolerance", "norm_tolerance", "model")}
    settings = cpu_settings(processes) | {"OMP_NUM_THREADS": "1"} if suite.device == "cpu" else {}
    found = run_plan("tools.bench.step.ranks", plan, processes, settings, folder)
    for result in found["results"]:
        result["processes"] = processes
    return found


def summarize(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result a number of processes, of tokens, and contender: memory beside times, medians, and speeds of ours."""
    merged: dict[tuple, dict[str, Any]] = {}
    for result in found:
        merged.setdefault((result["processes"], result["tokens"], result["contender"]), {}).update(result)
    for result in merged.values():
        if times := result.get("step_s"):
            median = statistics.median(times)
            result |= {"median_s": median, "min_s": min(times), "max_s": max(times)}
            result["tokens_per_s"] = result["processes"] * result["tokens"] / median
    for (processes, tokens, contender), result in merged.items():
        ours = merged.get((processes, tokens, OURS), {})
        if contender != OURS and "median_s" in result and "median_s" in ours:
            result["speed_of_ds_moe"] = result["median_s"] / ours["median_s"]
        if peak := ours.get("peak_bytes") if contender != OURS and "peak_bytes" in result else None:
            result["memory_of_ds_moe"] = peak / result["peak_bytes"]
        alone = merged.get((1, tokens, contender), {})
        if "tokens_per_s" in result and "tokens_per_s" in alone:
            result["of_linear"] = result["tokens_per_s"] / alone["tokens_per_s"] / processes
    return list(merged.values())


def time_cells(result: dict[str, Any]) -> list[str]:
    """Tokens a second, median and range, and what the busiest rank sends a step."""
    if "median_s" not in result:
        return ["wrong, not timed", "", "", ""]
    median, low, high = (f"{result[key] * 1e3:,.0f}" for key in ("median_s", "min_s", "max_s"))
    return [f"{result['tokens_per_s']:,.0f}", median, f"{low} - {high}", f"{result['sent_bytes'] / MIB:,.2f}"]


TIMES = ("tokens/s\nall ranks", "median ms\nof a step", "min - max", "MiB sent a rank\nin all-to-alls")


def time_table(results: list[dict[str, Any]]) -> Table:
    table = new_table(["tokens\na rank", "contender"], [*TIMES, "speed of\nds_moe to it", "loss off by"])
    for result in results:
        speed = f"{result['speed_of_ds_moe']:.2f}" if "speed_of_ds_moe" in result else ""
        cells = [str(result["tokens"]), CONTENDERS[result["contender"]], *time_cells(result)]
        table.add_row(*cells, speed, f"{result['loss_difference']:.0e}")
    return table


def memory_table(results: list[dict[str, Any]]) -> Table:
    columns = ("peak MiB\na rank", "before steps", "after imports", "ds_moe's peak\nto it")
    table = new_table(["tokens\na rank", "contender"], columns)
    for result in (result for result in results if "peak_bytes" in result):
        sizes = [f"{result[key] / MIB:,.0f}" for key in ("peak_bytes", "built_bytes", "imported_bytes")]
        ratio = f"{result['memory_of_ds_moe']:.2f}" if "memory_of_ds_moe" in result else ""
        table.add_row(str(result["tokens"]), CONTENDERS[result["contender"]], *sizes, ratio)
    return table


def scaling_table(results: list[dict[str, Any]]) -> Table:
    table = new_table([], ["tokens\na rank", "processes", *TIMES, "of linear"])
    for result in sorted(results, key=lambda result: (result["tokens"], result["processes"])):
        share = f"{result['of_linear']:.2f}" if "of_linear" in result else ""
        table.add_row(str(result["tokens"]), str(result["processes"]), *time_cells(result), share)
    return table


if __name__ == "__main__":
    sys.exit(main())
