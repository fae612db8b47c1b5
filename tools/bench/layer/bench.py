"""Time forward and backward of one MoE layer in one process: ours, its rivals, and two rooflines.

    python -m tools.bench.layer.bench --suite cpu --shape B --routing zipf --repeats 9 --json bench.json

Rivals: transformers (eager, grouped_mm), DeepSpeed (AutoEP, its first MoE layer), megablocks, liger-kernel; same
weights, input and routing for all. One whose output or gradients differ from transformers' eager layer is not timed.
Rooflines: one dense SwiGLU over as many rows, and a product of large square matrices, both with their backward.
Repetitions (n) are interleaved; a contender that takes 8 times the quickest's time gets a third of them. Speeds are
ratios of medians; time against our default's is taken repetition by repetition. "ds_moe (default)" and the backend it
stands for are one program: what lies between them is noise. Saved MiB: what autograd keeps after the forward, beside
input and parameters. Peak MiB (CUDA only): the most allocated at once in a forward and backward.
"""

import argparse
import itertools
import os
import statistics
import sys
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from rich.table import Table

from ds_moe.engine.cpu import cpu_settings
from ds_moe.errors import UserError
from ds_moe.moe.backends import choose_backend
from tools.bench.layer.block import ROUTINGS, SUITES, Case, Suite, Unavailable, draw_weights, routed_input
from tools.bench.layer.contenders import DEFAULT, EAGER, RIVAL, contenders, dense, square
from tools.bench.layer.growth import grow, growth_tables, write_figure
from tools.bench.layer.measure import difference, interleaved, peak_bytes, results, saved_bytes
from tools.results import command_line, new_table, show, write_json

ROOFLINE, GEMM = "dense SwiGLU (roofline)", "square product (roofline)"
SPEEDS = {"speed_to_rival": RIVAL, "speed_to_roofline": ROOFLINE, "speed_to_eager": EAGER}
MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
PACKAGES = ("torch", "transformers", "deepspeed", "triton", "megablocks", "grouped_gemm", "liger_kernel")
WIDTH = 190  # of the tables in a log file

Result = dict[str, Any]


def measure(name: str, suite: Suite, routing: str, repeats: int) -> list[Result]:
    """One result a contender: with `median_s` if it was timed, `unavailable` if it cannot run, else it is wrong."""
    shape = suite.shapes[name]
    weights = draw_weights(shape, suite)
    x = routed_input(shape, weights.router_ED, routing)
    case = Case(shape, weights, fullest=rows_of_fullest(x, weights.router_ED, shape.K))
    build = contenders()
    expected = results(build[EAGER](case), x)
    found: dict[str, Result] = {contender: {} for contender in (GEMM, ROOFLINE, *build)}
    *gemm, gemm_flops = square(suite)
    runs = {GEMM: tuple(gemm), ROOFLINE: dense(shape, suite)}
    for contender in build:
        try:
            block = build[contender](case)
            found[contender]["difference"] = difference(results(block, x), expected)
        except (Unavailable, UserError) as reason:
            found[contender]["unavailable"] = str(reason)
        except torch.OutOfMemoryError:
            found[contender]["unavailable"] = "out of memory"
        except Exception as error:
            if contender.startswith("ds_moe"):
                raise
            found[contender]["unavailable"] = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        else:
            found[contender] |= {"note": block.note} if block.note else {}
            if found[contender]["difference"] <= suite.tolerance:
                runs[contender] = block, x
    del expected

    times = interleaved(runs, suite.device, repeats, apart=(GEMM, ROOFLINE))
    medians = {contender: statistics.median(taken) for contender, taken in times.items()}
    for contender, taken in times.items():
        median_s = medians[contender]
        found[contender] |= {"seconds": taken, "median_s": median_s, "min_s": min(taken), "max_s": max(taken)}
        rate = (gemm_flops if contender == GEMM else shape.flops) / median_s
        found[contender] |= {"flops_per_s": rate, "of_gemm": rate * medians[GEMM] / gemm_flops}
        if contender == GEMM:  # of another size
            continue
        found[contender] |= {key: medians[to] / median_s for key, to in SPEEDS.items() if to in medians}
        found[contender] |= {"saved_bytes": saved_bytes(*runs[contender]), "peak_bytes": peak_bytes(*runs[contender])}
        if DEFAULT in times:
            pairs = [theirs / ours for theirs, ours in zip(taken, times[DEFAULT], strict=False)]
            figures = {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs), "each": pairs}
            found[contender]["time_to_default"] = figures
    keys = {"shape": name, "routing": routing}
    return [keys | {"contender": contender} | result for contender, result in found.items()]


def rows_of_fullest(x: torch.Tensor, router_ED: torch.Tensor, K: int) -> int:
    chosen_TK = (x.detach()[0] @ router_ED.detach().T).topk(K).indices
    return int(chosen_TK.flatten().bincount().max())


def table(rows: list[Result], title: str) -> Table:
    cuda = any(row.get("peak_bytes") for row in rows)
    speeds = "speed to HF\ngrouped_mm", "to\nroofline", "to HF\neager"
    columns = ["n", "median ms", "min - max", *speeds, f"time / {DEFAULT}'s\nmedian \\[min - max]"]
    columns += ["TFLOP/s\n(of GEMM)", "saved\nMiB", *(["peak\nMiB"] if cuda else []), "differs\nfrom eager"]
    table = new_table(["contender"], columns, title)
    for row in rows:
        differs = "" if row.get("difference") is None else f"{row['difference']:.0e}"
        if "median_s" not in row:
            state = "not run" if "unavailable" in row else "wrong"
            table.add_row(row["contender"], "0", state, *[""] * (len(columns) - 3), differs)
            continue
        median, low, high = (f"{row[key] * 1e3:.1f}" for key in ("median_s", "min_s", "max_s"))
        cells = [str(len(row["seconds"])), median, f"{low} - {high}"]
        cells += [f"{row[key]:.2f}" if key in row else "" for key in SPEEDS]
        pairs = row.get("time_to_default")
        cells.append(f"{pairs['median']:.2f} \\[{pairs['min']:.2f} - {pairs['max']:.2f}]" if pairs else "")
        cells.append(f"{row['flops_per_s'] / 1e12:.3g} ({row['of_gemm']:.0%})")
        memory = ["saved_bytes", "peak_bytes"] if cuda else ["saved_bytes"]
        cells += [f"{row[key] / 2**20:.3g}" if key in row else "" for key in memory]
        table.add_row(row["contender"], *cells, differs)
    return table


def settle_malloc(choice: str) -> None:
    """Start this process again unless glibc, which reads them once, has read the thresholds that `choice` asks for."""
    launcher = cpu_settings(1)
    wanted = {name: launcher[name] for name in MALLOC} if choice == "launcher" else {}
    if wanted != {name: os.environ[name] for name in MALLOC if name in os.environ}:
        others = {name: value for name, value in os.environ.items() if name not in MALLOC}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], others | wanted)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_line(__doc__, "--json", "--plot")
    parser.add_argument("--suite", choices=SUITES, default="cpu", help="cpu and smoke: fp32; h100: bf16 (default cpu)")
    parser.add_argument("--shape", action="append", metavar="NAME", help="only this shape of the suite (repeatable)")
    parser.add_argument("--routing", action="append", choices=ROUTINGS, help="only this routing (repeatable)")
    parser.add_argument("--growth", action="store_true", help="instead, how time and saved memory grow with T, E and K")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions after a warm-up (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default %(default)s)")
    malloc = "of a CPU's memory: as ds-moe's launcher sets it for all, or glibc's own (default launcher)"
    parser.add_argument("--malloc", choices=("launcher", "default"), default="launcher", help=malloc)
    options = parser.parse_args(arguments)
    suite = SUITES[options.suite]
    if unknown := set(options.shape or ()) - set(suite.shapes):
        parser.error(f"--shape {min(unknown)}: suite {options.suite} has {', '.join(suite.shapes)}")
    if options.growth and (options.shape or options.routing):
        parser.error("--growth has shapes of its own and uniform routing: leave out --shape and --routing")
    if options.plot and not options.growth:
        parser.error("--plot draws what --growth measures: add it")
    if min(options.repeats, options.threads) < 1:
        parser.error("--repeats and --threads must be at least 1")
    if suite.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--suite {options.suite} needs a CUDA device; --suite cpu runs here")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    suite = SUITES[options.suite]
    if suite.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would choose a GPU's kernels where there is one
    torch.set_num_threads(options.threads)
    versions = {package: version(package) for package in PACKAGES if find_spec(package)}
    facts: dict[str, Any] = {
        "suite": options.suite,
        "repeats": options.repeats,
        "environment": {
            **{"versions": versions, "threads": torch.get_num_threads(), "dtype": str(suite.dtype)},
            "device": torch.cuda.get_device_name() if suite.device == "cuda" else "cpu",
            "default_backend": ": ".join(choose_backend(suite.device, suite.dtype)),
            "malloc": {name: os.environ.get(name, "glibc's default") for name in MALLOC},
        },
    }
    wrong = growing(options, suite, facts) if options.growth else racing(options, suite, facts)
    facts["environment"]["load_average"] = round(os.getloadavg()[0], 1)  # well above `threads`: others were running
    show(facts["environment"], width=WIDTH)
    write_json(facts, options.json, indent=1)
    if wrong:
        print(f"error: results differ by more than {suite.tolerance}: {wrong}", file=sys.stderr)
    return 1 if wrong else 0


def racing(options: argparse.Namespace, suite: Suite, facts: dict[str, Any]) -> list[str]:
    """Adds `shapes` and `results`; returns the contenders that are wrong."""
    names, routings = options.shape or list(suite.shapes), options.routing or ROUTINGS
    facts |= {"shapes": {name: suite.shapes[name]._asdict() for name in names}, "results": []}
    said: set[str] = set()
    for name, routing in itertools.product(names, routings):
        print(f"measuring shape {name}, routing {routing}", file=sys.stderr, flush=True)
        rows = measure(name, suite, routing, options.repeats)
        sizes = ", ".join(f"{key} {value}" for key, value in suite.shapes[name]._asdict().items())
        show(table(rows, f"shape {name} ({sizes}), routing {routing}"), width=WIDTH)
        facts["results"] += rows
        lines = [f"not run: {row['contender']}: {row['unavailable']}" for row in rows if "unavailable" in row]
        lines += [f"{row['contender']}: {row['note']}" for row in rows if "note" in row]
        for line in dict.fromkeys(lines):
            if line not in said:
                print(line)
        said |= set(lines)
    return sorted({row["contender"] for row in facts["results"] if not {"median_s", "unavailable"} & set(row)})


def growing(options: argparse.Namespace, suite: Suite, facts: dict[str, Any]) -> list[str]:
    try:
        facts["growth"] = grow(suite, options.repeats)
    except ArithmeticError as error:
        return [str(error)]
    show(*growth_tables(facts["growth"]), width=WIDTH)
    if options.plot:
        write_figure(facts["growth"], options.plot)
    return []


if __name__ == "__main__":
    chosen = parse()
    if SUITES[chosen.suite].device == "cpu":
        settle_malloc(chosen.malloc)
    sys.exit(main())
