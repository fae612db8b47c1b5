"""Time what a rank's training loop gets from its data: samples and bytes a second, by the number of loading processes.

this      this build, records as they are in their file
prepared  this build, behind `ds-moe data prepare`
COMMIT    an earlier build (--before, repeatable)
hf        `datasets` and torch's DataLoader with the same processor and chat template

All read the same records: images of the sizes in ../mix/screens.csv, as PNG and as JPEG files, requests and answers of
its lengths. A contender is timed only if the ids and the floats of every image are those of the plain processor, bit
for bit. Contenders are processes that take turns; a turn reads all records once, and its clock starts behind the first
batch. Bytes are those of ids, labels and float pixels, whoever makes them. CPU time is that of all of its processes and
threads.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ds_moe.errors import UserError
from ds_moe.models.processor import save_processor
from tools.bench.data.loaders import MARK, digest
from tools.bench.data.plot import draw
from tools.bench.data.prepared import prepare_records
from tools.bench.launched import ROOT
from tools.bench.mix.bench import check_out
from tools.bench.mix.records import build_processor, drawn, read_screens, write_records
from tools.results import Claim, command_line, judged, new_table, print_claims, refusing, show, write_json

BEFORE = ("e49d3ff", "a905cbf")  # the build of the first release's draft; the last one that handed on floats
FORMS = ("png", "jpeg")
WORKERS = (0, 1, 2)
SAMPLES, BATCH, REPEATS, SEED = 192, 8, 3, 0
OURS, PREPARED, RIVAL = "this", "prepared", "hf"
AIMS = {RIVAL: 1.5}  # how many times their speed this build must have; of an earlier build AIM_BEFORE
AIM_BEFORE = 2.0


class Loader:
    """The process of one contender, see `loaders.py`."""

    def __init__(self, name: str, plan: dict[str, Any]) -> None:
        self.name = name
        paths = dict.fromkeys([plan["checkout"], str(ROOT)])  # of a module in both, the checkout's
        settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.bench.data.loaders", json.dumps(plan)],
            cwd=plan["checkout"],
            env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def turn(self, what: str, file: Path, workers: int) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"turn": what, "file": str(file), "workers": workers}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return line.removeprefix(MARK)
        raise UserError(f"the loader {self.name!r} has ended (what it said stands above)")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def running(name: str, plan: dict[str, Any]) -> Iterator[Loader]:
    loader = Loader(name, plan)
    try:
        yield loader
    finally:
        loader.close()


def plans(options: argparse.Namespace, folder: Path, model: Path) -> dict[str, dict[str, Any]]:
    """What each contender's process is told."""
    every: dict[str, Any] = {"model": str(model), "batch": options.batch, "samples": options.samples}
    every |= {"checkout": str(ROOT), "prepared": False, "rival": False}
    found = {OURS: every, PREPARED: every | {"prepared": True}, RIVAL: every | {"rival": True}}
    for commit in options.before:
        checkout = folder / commit
        check_out(commit, checkout)
        found[commit] = every | {"checkout": str(checkout)}
    return found


def expected(file: Path) -> list[str]:
    """The digest of each record, by the plain processor."""
    processor = build_processor()
    found = []
    for line in file.read_text().splitlines():
        request, answer = json.loads(line)["messages"]
        image, text = request["content"]
        turns = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text["text"]}]},
            {"role": "assistant", "content": answer["content"]},
        ]
        written = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
        with Image.open(file.parent / image["image"]) as picture:
            made = processor(text=[written], images=[picture.convert("RGB")], return_tensors="pt")
        found.append(digest(made["input_ids"][0], made["pixel_values"]))
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, model = Path(name), Path(name) / "model"
        save_processor(build_processor(), model)
        screens = drawn(read_screens(), options.samples, SEED)
        files = {form: write_records(screens, folder / form, SEED, form) for form in FORMS}
        wanted = {form: expected(file) for form, file in files.items()}
        for file in files.values():
            prepare_records(file, model)
        loaders = [stack.enter_context(running(*one)) for one in plans(options, folder, model).items()]
        problems: dict[str, str] = {}
        for loader in loaders:
            for form, file in files.items():
                if (found := loader.turn("check", file, 1)) != wanted[form]:
                    wrong = sum(one != other for one, other in zip(found, wanted[form], strict=False))
                    problems[loader.name] = f"{wrong} of {len(found)} samples of {form} differ from the processor's"
        right = [loader for loader in loaders if loader.name not in problems]
        results = []
        for form, file in files.items():
            for workers in options.workers:
                print(f"{form}, {workers} loading processes: {options.repeats} rounds", file=sys.stderr, flush=True)
                rounds = [{one.name: one.turn("time", file, workers) for one in right} for _ in range(options.repeats)]
                results += [result(form, workers, one.name, rounds) for one in right]
    facts = {"cores": len(os.sched_getaffinity(0)), "load_average": load, "torch": torch.__version__}
    facts |= {"samples": options.samples, "batch": options.batch, "repeats": options.repeats}
    facts["mean_pixels"] = round(statistics.mean(one.width * one.height for one in screens))
    return facts | {"problems": problems, "results": results, "claims": claims(results, options.before)}


def result(form: str, workers: int, name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of a contender's turns, and of the ratios of this build's speed to its speed in the same round."""
    speeds = [turns[name]["samples"] / turns[name]["seconds"] for turns in rounds]
    own = [turns[OURS]["samples"] / turns[OURS]["seconds"] for turns in rounds] if OURS in rounds[0] else speeds
    return {
        **{"form": form, "workers": workers, "contender": name, "samples_per_s": speeds},
        "median": statistics.median(speeds),
        "mb_per_s": statistics.median(turns[name]["bytes"] / turns[name]["seconds"] / 1e6 for turns in rounds),
        "cpu_ms": statistics.median(turns[name]["cpu_seconds"] / turns[name]["samples"] * 1e3 for turns in rounds),
        "speed_of_this": statistics.median(mine / its for mine, its in zip(own, speeds, strict=True)),
    }


def claims(results: list[dict[str, Any]], before: list[str]) -> list[Claim]:
    aims = {**AIMS, **dict.fromkeys(before, AIM_BEFORE)}
    found = []
    for one in results:
        if (aim := aims.get(one["contender"])) is not None:
            where = f"{one['form']}, {one['workers']} loading processes"
            text = f"{where}: {one['speed_of_this']:.2f} times the speed of {one['contender']}, at least {aim}"
            found.append((text, one["speed_of_this"] >= aim))
    return judged(found)


def show_results(found: dict[str, Any]) -> None:
    show({key: value for key, value in found.items() if key not in ("results", "claims")})
    table = new_table(
        ["images", "contender"], ["loading\nprocesses", "samples/s", "min - max", "MB/s", "CPU ms\na sample", "this is"]
    )
    for one in found["results"]:
        speeds = one["samples_per_s"]
        cells = [one["form"], one["contender"], str(one["workers"]), f"{one['median']:,.1f}"]
        cells += [
            f"{min(speeds):,.1f} - {max(speeds):,.1f}",
            f"{one['mb_per_s']:,.0f}",
            f"{one['cpu_ms']:.1f}",
            f"x {one['speed_of_this']:.2f}",
        ]
        table.add_row(*cells)
    show(table)
    print_claims(found["claims"])


@refusing
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    found = json.loads(options.show.read_text()) if options.show else measure(options)
    show_results(found)
    write_json(found, options.json, indent=1)
    if options.plot:
        draw(found, options.plot)
    for name, problem in found["problems"].items():
        print(f"error: {name}: {problem}", file=sys.stderr)
    return 1 if found["problems"] else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, "--suite", "--json", "--plot", "--show")
    add = parser.add_argument
    add("--before", action="append", metavar="COMMIT", help=f"an earlier build (default {', '.join(BEFORE)})")
    add("--workers", type=int, action="append", metavar="N", help=f"loading processes (default {WORKERS})")
    add("--samples", type=int, default=SAMPLES, help=f"records of each turn (default {SAMPLES})")
    add("--batch", type=int, default=BATCH, help=f"of a batch (default {BATCH})")
    add("--repeats", type=int, default=REPEATS, help=f"rounds (default {REPEATS})")
    options = parser.parse_args(arguments)
    options.before, options.workers = options.before or [*BEFORE], options.workers or [*WORKERS]
    if options.samples % options.batch or options.samples < 2 * options.batch:
        parser.error(f"--samples: {options.samples} is no multiple of {options.batch}, or only one batch")
    return options


if __name__ == "__main__":
    sys.exit(main())
