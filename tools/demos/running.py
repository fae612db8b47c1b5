"""What the demos share: programs that they run, and how they end."""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ds_moe.monitor.progress import print_table
from tools.results import Claim, print_claims, write_json

ROOT = Path(__file__).resolve().parents[2]
EXECUTABLE = str(Path(sys.executable).with_name("ds-moe"))
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # of each of two processes on two cores


def start_anew(folder: Path) -> None:
    """Work at the project's root, in an empty folder: a demo starts anew, where a real run would resume."""
    os.chdir(ROOT)
    shutil.rmtree(folder, ignore_errors=True)


def run(*words: object, log: Path | None = None, settings: dict[str, str] = ONE_THREAD) -> None:
    """Run one command, its output to a log if given; its failure is the demo's."""
    shown = " ".join(map(str, words)).replace(EXECUTABLE, "ds-moe").replace(sys.executable, "python")
    print(f"\n$ {shown}{f' > {log}' if log else ''}", flush=True)
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") if log is not None else nullcontext() as out:
        done = subprocess.run([*map(str, words)], stdout=out, stderr=out, env={**os.environ, **settings})
    if done.returncode != 0:
        sys.exit(f"{' '.join(shown.split()[:3])} failed{f', see {log}' if log else ''}")


def finish(
    options: argparse.Namespace,
    result: dict[str, Any],
    rows: Mapping[str, str],
    title: str,
    draw: Callable[[Path], None],
) -> int:
    """Print the rows and the claims of `result`, write what --json and --plot ask for; the exit status."""
    claims: list[Claim] = result["claims"]
    print_table({**rows, "time": f"{result['seconds']:.0f} s"}, title)
    print_claims(claims)
    write_json(result, options.json, indent=1)
    if options.plot:
        draw(options.plot)
    return 0 if all(claim["holds"] for claim in claims) else 1
