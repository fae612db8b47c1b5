"""What would fail or be slow in a run, said before an accelerator is booked: one line a finding."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ds_moe.config.run_file import parse_run
from ds_moe.doctor import data, engine, memory, model, packing, resume, run
from ds_moe.doctor.case import Case, Finding
from ds_moe.errors import UserError

COLOURS = {"ok": "32", "warning": "33", "error": "31"}  # ANSI green, yellow, red
CHECKS = [  # the cheap and certain ones first; a later check uses what an earlier one has established
    run.check_device,
    run.check_cores,
    run.check_kernels,
    resume.find_checkpoint,
    model.find_model,
    run.check_deepspeed,
    model.check_files,
    memory.check_outline,
    data.check_data,
    packing.check_packing,
    engine.check_engine,
    resume.check_room,  # before the resumption converts the outline
    resume.check_resume,
    model.check_experts,
    model.check_linear_attention,
    model.check_routing,
    run.check_warmup,
    run.check_intervals,
]


def diagnose(
    path: str | Path,
    overrides: list[str] | None = None,
    world_size: int = 1,
    samples: int = 64,
    device_memory: float | None = None,
) -> Iterator[Finding]:
    """Yield findings about a run as the checks make them. A check is skipped where what it builds on is not known.

    Args:
        samples: records of each data file to decode and tokenize.
        device_memory: GiB of one accelerator; None: that of this machine's accelerators, or of its CPUs without one.
    """
    yield from run.versions()
    config, complaints = parse_run(path, overrides)
    yield from (Finding("error", complaint) for complaint in complaints)
    if config is None:
        return
    if not complaints:
        yield Finding("ok", f"{path}: every key is known, in range and used")
    try:
        device = run.find_device(world_size, device_memory)
    except UserError as error:
        yield Finding("error", str(error))
        return
    case = Case(config, world_size, device, samples)
    shown = set(complaints)
    for check in CHECKS:
        for finding in check(case):
            if finding.text not in shown:  # two checks may meet the same mistake
                shown.add(finding.text)
                yield finding


def report(findings: Iterator[Finding], out: TextIO) -> int:
    """Print findings as they come and count them at the end. Returns the exit code: 1 if there was an error, else 0."""
    colour = out.isatty() and "NO_COLOR" not in os.environ
    counts = {"error": 0, "warning": 0, "ok": 0}
    for finding in findings:
        counts[finding.level] += 1
        label = f"{finding.level:<9}"
        label = f"\033[{COLOURS[finding.level]}m{label}\033[0m" if colour else label
        print(label + finding.text, *(" " * 11 + line for line in finding.details), sep="\n", file=out, flush=True)
    print(f"{counts['error']} errors, {counts['warning']} warnings", file=out)
    return 1 if counts["error"] else 0
