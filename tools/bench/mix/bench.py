"""Time training steps on a real mix of images and texts: packed rows against padded ones, and against other trainers.

packed    this build, rows of up to N tokens that hold whole samples (data.packing)
padded    this build, a sample a row
before    an earlier build (--before COMMIT), a sample a row
zero3     ZeRO-3 + transformers grouped_mm: the model as it is, each MoE block a ZeRO-3 leaf module
autoep    DeepSpeed AutoEP, experts spread over all ranks

2 processes, ZeRO-3, fp32, EP 2 where the contender can. All train the same records in the same global batches: images
of the sizes in screens.csv, texts of its lengths. A contender is timed only if, on every global batch, its loss and the
norm of its gradients are those of plain transformers, sample by sample. Each is timed at every one of its settings, and
at its quickest once more, in turns with packed rows. Tokens are real ones: no padding, no samples that fill up.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from ds_moe.errors import UserError
from tools.bench.launched import ROOT
from tools.bench.mix.flops import forward_flops
from tools.bench.mix.jobs import PROCESSES, Job
from tools.bench.mix.model import real_config, save_model, small_config
from tools.bench.mix.plot import draw
from tools.bench.mix.records import build_processor, drawn, read_screens, write_records
from tools.bench.mix.reference import lengths, references
from tools.bench.mix.report import CONTENDERS, MIB, OURS, claims, show_results
from tools.bench.mix.turns import Turn
from tools.results import command_line, refusing, write_json

BEFORE = "e49d3ff"  # the build before there was packing
BATCH, BATCHES, REPEATS = 32, 3, 5  # samples of a global batch, global batches, rounds
MICRO_BATCHES, ROWS = [1, 2, 4, 8], [2048, 4096]  # settings: samples, tokens
MAX_PIXELS, SEED = 16_777_216, 0
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4  # largest difference to plain transformers; the norm's is relative
CACHE_BYTES = 2**31  # of encoded samples; all of them


class Setting(NamedTuple):
    contender: str
    size: int  # tokens a row where rows are packed, else samples a micro-batch

    @property
    def name(self) -> str:
        return f"{self.contender}-{self.size}"


class Bench:
    """The records, the model, what plain transformers makes of them, and how to start a contender on them."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        processor = build_processor()
        screens = [one for one in read_screens() if not options.max_area or one.width * one.height <= options.max_area]
        screens = drawn(screens, options.batch * options.batches, SEED)
        self.records = write_records(screens, folder / "data", SEED)
        self.model = folder / "model"
        save_model(self.model, processor)
        self.lengths = lengths(self.model, self.records, max(ROWS), MAX_PIXELS)
        self.max_length = max(tokens for tokens, _, _ in self.lengths)
        torch.set_num_threads(PROCESSES)
        self.expected = references(self.model, self.records, options.batch, self.max_length, MAX_PIXELS)
        self.earlier = folder / "earlier"
        if any(one.contender == "before" for one in options.settings):
            check_out(options.before, self.earlier)

    def start(self, setting: Setting) -> Job:
        """A job of its own, named by how often this setting was started."""
        number = len(list(self.folder.glob(f"{setting.name}.*")))
        folder = self.folder / f"{setting.name}.{number}"
        plan: dict[str, Any] = {"batches": self.options.batches, "cache_bytes": CACHE_BYTES}
        if setting.contender in ("zero3", "autoep"):
            plan |= {"contender": setting.contender, "model": str(self.model), "records": str(self.records)}
            plan |= {"micro_batch_size": setting.size, "global_batch_size": self.options.batch}
            return Job("tools.bench.mix.rivals", plan | {"max_length": self.max_length}, folder)
        run_file = self.folder / f"{setting.name}.yaml"
        run_file.write_text(yaml.safe_dump(self.run(setting, folder / "run")))
        checkout = self.earlier if setting.contender == "before" else ROOT
        return Job(
            "tools.bench.mix.runs", plan | {"run_file": str(run_file), "checkout": str(checkout)}, folder, checkout
        )

    def run(self, setting: Setting, output: Path) -> dict[str, Any]:
        """The run file. The learning rate is so small that no weight changes, so that every step can be checked."""
        packed = setting.contender == OURS
        data: dict[str, Any] = {"train": str(self.records), "shuffle": False, "max_length": self.max_length}
        batch = {"tokens_per_micro_batch" if packed else "micro_batch_size": setting.size}
        checkout = self.earlier if setting.contender == "before" else ROOT
        return {
            "model": {"path": str(self.model)},
            "data": data | ({"packing": True} if packed else {}),
            "moe": {"ep_size": PROCESSES},
            "train": {
                **{"output_dir": str(output), "steps": 10_000, "global_batch_size": self.options.batch, **batch},
                **{"lr": 1e-20, "schedule": "constant", "precision": "fp32", "resume": "never"},
                **{"watchdog_s": 86_400},  # while others take their turns this job makes no progress
            },
            "monitor": {"tensorboard": False},
            "deepspeed": str(checkout / "ds_configs/zero3.json"),
        }

    def problem(self, turn: Turn) -> str | None:
        """Where its steps are not those of plain transformers."""
        for number, (step, expected) in enumerate(zip(turn.steps, self.expected, strict=True)):
            loss, norm = step.loss - expected["loss"], step.grad_norm / expected["grad_norm"] - 1
            if not (abs(loss) <= LOSS_TOLERANCE and abs(norm) <= NORM_TOLERANCE):
                return f"global batch {number}: loss off by {loss:.1e}, norm of the gradients by {norm:.1e} of it"
            if step.tokens != expected["tokens"]:
                return f"global batch {number}: {step.tokens} tokens instead of {expected['tokens']}"
        return None


def check_out(commit: str, folder: Path) -> None:
    """An earlier build's package, from the history of this checkout. Raises `UserError` where it has none."""
    folder.mkdir()
    wanted = ["git", "archive", commit, "ds_moe", "ds_configs", "constraints.txt"]
    archive = subprocess.run(wanted, cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise UserError(
            f"--before {commit}: {' '.join(archive.stderr.decode().split())} (needs a clone with its history)"
        )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    if pins(folder) != pins(ROOT):
        raise UserError(
            f"--before {commit} pins other packages than this build; it would need an environment of its own"
        )


def pins(checkout: Path) -> set[str]:
    """Of the packages that a training step runs on."""
    lines = (checkout / "constraints.txt").read_text().splitlines()
    return {line for line in lines if line.startswith(("torch==", "deepspeed==", "transformers==", "numpy=="))}


@contextmanager
def running(bench: Bench, setting: Setting) -> Iterator[Job]:
    job = bench.start(setting)
    try:
        yield job
        job.end()
    finally:
        job.kill()


def tokens_per_s(turn: Turn) -> float:
    return sum(step.tokens for step in turn.steps) / sum(step.seconds for step in turn.steps)


def scan(bench: Bench, turns: int) -> list[dict[str, Any]]:
    """Each setting by itself: a turn that warms up and is checked, then so many timed ones."""
    found = []
    for setting in bench.options.settings:
        print(f"{setting.name}: checking and timing", file=sys.stderr, flush=True)
        with running(bench, setting) as job:
            first = job.turn()
            problem = bench.problem(first)
            result = timed_result(bench, setting, first, [job.turn() for _ in range(turns) if problem is None])
        found.append(result)
        said = result["problem"] or f"{result['median']:,.0f} tokens/s, {result['peak_bytes'] / MIB:,.0f} MiB"
        print(f"{setting.name}: {said}", file=sys.stderr, flush=True)
    return found


def described(bench: Bench, turn: Turn) -> dict[str, Any]:
    pairs = list(zip(turn.steps, bench.expected, strict=True))
    return {
        "loss_difference": max(abs(step.loss - expected["loss"]) for step, expected in pairs),
        "norm_difference": max(abs(step.grad_norm / expected["grad_norm"] - 1) for step, expected in pairs),
        "micro_steps": [step.micro_steps for step in turn.steps],
    }


def figures(turns: list[Turn]) -> dict[str, Any]:
    """Of timed turns; nothing where there are none."""
    if not turns:
        return {}
    speeds = [tokens_per_s(turn) for turn in turns]
    return {
        "tokens_per_s": speeds,
        **{"median": statistics.median(speeds), "min": min(speeds), "max": max(speeds)},
        "step_s": [[step.seconds for step in turn.steps] for turn in turns],
        "peak_bytes": max(peak for turn in turns for peak in turn.peak_bytes),
        "peak_bytes_by_rank": [max(peaks) for peaks in zip(*(turn.peak_bytes for turn in turns), strict=True)],
    }


def quickest(scanned: list[dict[str, Any]]) -> list[Setting]:
    """Of each contender that is right at any setting."""
    right = [one for one in scanned if one["problem"] is None]
    names = dict.fromkeys(one["contender"] for one in right)
    best = [max((one for one in right if one["contender"] == name), key=lambda one: one["median"]) for name in names]
    return [Setting(one["contender"], one["size"]) for one in best]


def compare(bench: Bench, settings: list[Setting], repeats: int) -> list[dict[str, Any]]:
    """Packed rows in turns with one of the others after the other, so that two jobs at most need their memory.

    Each begins with a turn that warms up and is checked.
    """
    ours, *rivals = sorted(settings, key=lambda setting: setting.contender != OURS)
    with running(bench, ours) as job:
        first, own = job.turn(), []
        results = []
        for rival in rivals:
            print(f"{ours.name} and {rival.name}, in turns", file=sys.stderr, flush=True)
            with running(bench, rival) as other:
                its_first = other.turn()
                pairs = [(job.turn(), other.turn()) for _ in range(repeats)]
            own += [mine for mine, _ in pairs]
            speed = statistics.median(tokens_per_s(mine) / tokens_per_s(its) for mine, its in pairs)
            found = timed_result(bench, rival, its_first, [its for _, its in pairs])
            results.append(found | {"speed_of_packed": speed})
        own = own or [job.turn() for _ in range(repeats)]
    return [timed_result(bench, ours, first, own), *results]


def timed_result(bench: Bench, setting: Setting, first: Turn, turns: list[Turn]) -> dict[str, Any]:
    return {
        **setting._asdict(),
        "problem": bench.problem(first),
        **described(bench, first),
        **figures(turns),
    }


@refusing
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    found = json.loads(options.show.read_text()) if options.show else measure(options)
    show_results(found)
    write_json(found, options.json, indent=1)
    if options.plot:
        draw(found, options.plot)
    wrong = [one for one in found["scan"] if one["problem"]]
    for one in wrong:
        problem = f"{CONTENDERS[one['contender']]} at {one['size']}: {one['problem']}"
        print(f"error: not what plain transformers computes: {problem}", file=sys.stderr)
    return 1 if wrong else 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options)
        found = facts(bench) | {"load_average": load, "rounds": []}
        if options.scan:
            found["scan"] = json.loads(options.scan.read_text())["scan"]
        else:
            found["scan"] = scan(bench, options.repeats if options.only_scan else 1)
        if not options.only_scan:
            found["rounds"] = compare(bench, quickest(found["scan"]), options.repeats)
            found["claims"] = claims(found["rounds"])
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, "--suite", "--json", "--plot", "--show")
    parser.add_argument("--contender", choices=CONTENDERS, action="append", help="only this one (repeatable)")
    parser.add_argument("--micro-batch", type=int, action="append", metavar="B", help="samples (repeatable)")
    parser.add_argument("--tokens", type=int, action="append", metavar="N", help="of a packed row (repeatable)")
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT", help=f"the earlier build (default {BEFORE})")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"samples of a global batch (default {BATCH})")
    parser.add_argument("--batches", type=int, default=BATCHES, help=f"global batches (default {BATCHES})")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"rounds (default {REPEATS})")
    parser.add_argument("--max-area", type=int, metavar="PIXELS", help="leave out larger screens")
    parser.add_argument("--only-scan", action="store_true", help="no rounds: each setting by itself, --repeats turns")
    parser.add_argument("--scan", type=Path, metavar="FILE", help="the --json of an --only-scan; only rounds are run")
    options = parser.parse_args(arguments)
    sizes = dict.fromkeys(CONTENDERS, options.micro_batch or MICRO_BATCHES) | {OURS: options.tokens or ROWS}
    options.settings = [Setting(name, size) for name in options.contender or CONTENDERS for size in sizes[name]]
    return options


def facts(bench: Bench) -> dict[str, Any]:
    import deepspeed
    import transformers

    samples = [(tokens, of_image) for tokens, of_image, _ in bench.lengths]
    tokens, of_images, labels = (sum(column) for column in zip(*bench.lengths, strict=True))
    return {
        "environment": {module.__name__: module.__version__ for module in (torch, deepspeed, transformers)},
        **{"cores": len(os.sched_getaffinity(0)), "processes": PROCESSES, "before": bench.options.before},
        **{"batch": bench.options.batch, "batches": bench.options.batches, "repeats": bench.options.repeats},
        "median_tokens": statistics.median(tokens for tokens, _, _ in bench.lengths),
        "longest": bench.max_length,
        "labelled": labels / tokens,
        "of_images": of_images / tokens,
        "shares": forward_flops(small_config(), samples).shares,
        "shares_of_qwen3_vl_30b_a3b": forward_flops(real_config(), samples).shares,
    }


if __name__ == "__main__":
    sys.exit(main())
