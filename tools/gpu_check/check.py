"""What one GPU shows of ds_moe, in under eight minutes: `python -m tools.gpu_check.check [SECTION ...] [--json FILE]`.

Each section runs in a process of its own, so that one that fails, hangs or breaks the device costs the others nothing.
A line of JSON is a fact; its `ok` says whether it is as it must be. The last line counts; the status is 1 where a fact
is not ok or a section has not ended by itself. Without a GPU it needs --toy: the same code at toy sizes, on the CPU.
What the sections show: docs/gpu.md.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from ds_moe.errors import UserError
from tools.gpu_check.facts import Check
from tools.results import command_line, refusing

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 470.0  # of all sections together
TOY_LIMIT_S = 1200.0  # of one, on a CPU that may be busy
SECTIONS = {  # name -> seconds that it may take
    "env": 30,
    "kernels": 60,
    "exchange": 60,
    "two": 110,
    "run": 110,
    "train_zero2": 100,
    "train_zero3": 100,
    "pieces": 60,
    "layer": 90,
}


def found(name: str) -> Callable[[Check], None]:
    """A section. Only its own file is imported, whose imports are what most of its seconds at toy size are."""
    from tools.gpu_check import layers

    if hasattr(layers, name):
        return getattr(layers, name)
    from tools.gpu_check import engines

    return getattr(engines, name)


def inside(names: list[str], check: Check) -> int:
    """Run sections in this process; what one raises is a fact, and not the end."""
    for name in names:
        check.section = name
        try:
            found(name)(check)
        except Exception:
            check.say("raised", False, traceback=traceback.format_exc()[-3000:])
        if check.gpu:
            torch.cuda.empty_cache()
    return 1 if check.failed else 0


def apart(name: str, toy: bool, limit_s: float, lines: list[str]) -> None:
    """Run a section in a process of its own and pass on what it says."""
    command = [sys.executable, "-m", "tools.gpu_check.check", "--inside", name, *(["--toy"] if toy else [])]
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, errors = process.communicate(timeout=max(limit_s, 1.0))
        ended = process.returncode in (0, 1)
        why = {} if ended else {"status": process.returncode, "stderr": errors[-3000:]}
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        said, errors = process.communicate()
        ended, why = False, {"limit_s": round(limit_s), "stderr": errors[-3000:]}
    facts = [line for line in said.splitlines() if line.startswith("{")]
    print("\n".join(facts), flush=True)
    lines += facts
    last = {"section": name, "fact": "ended", "ok": ended, "seconds": round(time.monotonic() - began, 1), **why}
    lines.append(json.dumps(last))
    print(lines[-1], flush=True)


@refusing
def main(words: list[str] | None = None) -> int:
    parser = command_line(__doc__, "--json")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--toy", action="store_true", help="toy sizes, on the CPU")
    parser.add_argument("--inside", nargs="+", metavar="SECTION", help="run them in this process")
    options = parser.parse_args(words)
    if unknown := sorted({*options.sections} - {*SECTIONS}):
        raise UserError(f"{unknown[0]} is no section; choose of {', '.join(SECTIONS)}")
    if not (options.toy or torch.cuda.is_available()):
        raise UserError("no GPU is visible here; --toy runs the same code at toy sizes on the CPU")
    device = torch.device("cpu" if options.toy else "cuda", *(() if options.toy else (0,)))
    if options.inside:
        torch.set_num_threads(1 if options.toy else torch.get_num_threads())
        return inside(options.inside, Check(device, full=not options.toy))
    lines: list[str] = []
    began = time.monotonic()
    for name in options.sections or SECTIONS:
        limit_s = TOY_LIMIT_S if options.toy else min(SECTIONS[name], LIMIT_S - (time.monotonic() - began))
        apart(name, options.toy, limit_s, lines)
    facts = [json.loads(line) for line in lines]
    failed = [f"{fact['section']}: {fact['fact']}" for fact in facts if fact.get("ok") is False]
    verdict = {"fact": "verdict", "ok": not failed, "facts": len(facts), "failed": failed}
    verdict["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(verdict), flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text("".join(json.dumps(fact) + "\n" for fact in [*facts, verdict]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
