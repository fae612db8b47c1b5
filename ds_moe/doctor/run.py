"""Checks that need the run file, the DeepSpeed JSON and this machine only."""

import os
import sys
from collections.abc import Iterator
from importlib import metadata

from ds_moe.config.check import attention_problem, warmup_problem
from ds_moe.config.deepspeed import (
    deepspeed_problems,
    moves_nothing,
    precision,
    summed_in_bf16,
    trains_on_cpu,
    zero_plan,
)
from ds_moe.config.deepspeed_json import is_missing
from ds_moe.config.rules.rule import written
from ds_moe.doctor.case import GIB, Case, Device, Finding
from ds_moe.engine.cpu import cpu_settings
from ds_moe.errors import UserError

GIVEN = "--device-memory"  # source of a device that the caller describes
WATCHED = ("torch", "deepspeed", "transformers")  # always named in the report


def versions() -> Iterator[Finding]:
    """Installed packages against the ranges of ds_moe's own metadata."""
    from packaging.requirements import Requirement

    try:
        requires = [Requirement(line) for line in metadata.requires("ds-moe") or []]
    except metadata.PackageNotFoundError:
        requires = []  # a checkout on the path: nothing says which ranges hold
    for requirement in requires:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None:
            yield Finding("error", f"{requirement.name} is not installed: pip install '{requirement}'")
        elif not requirement.specifier.contains(found, prereleases=True):
            text = f"{requirement.name} {found} is outside the range ds_moe is written for: pip install '{requirement}'"
            yield Finding("warning", text)
    shown = ", ".join(f"{name} {_version(name) or 'missing'}" for name in WATCHED)
    ranges = "" if requires else " (ds-moe is not installed as a package: no ranges to compare with)"
    yield Finding("ok", f"versions: python {sys.version.split()[0]}, {shown}{ranges}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def find_device(world_size: int, device_memory: float | None) -> Device:
    """What the ranks would compute on: accelerators of `device_memory` GiB, else those of this machine, else its CPUs.

    Raises `UserError` where the accelerator does not tell its memory, or DS_ACCELERATOR names one that is not there.
    """
    if device_memory is not None:
        return Device(False, device_memory * GIB, GIVEN)
    if not trains_on_cpu():
        return _accelerator()
    import psutil  # DeepSpeed depends on it

    share = psutil.virtual_memory().available / world_size
    return Device(True, share, f"this machine's free memory over {world_size} CPU ranks")


def _accelerator() -> Device:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        named = os.environ["DS_ACCELERATOR"]  # it is set: without it the ranks of this machine train on CPUs
        text = f"DS_ACCELERATOR is {named!r}, but this machine has no accelerator; give --device-memory GIB"
        raise UserError(f"{text}, or set DS_ACCELERATOR=cpu for a job on CPUs")
    properties = getattr(torch.get_device_module(found), "get_device_properties", lambda index: None)(0)
    memory = getattr(properties, "total_memory", None)
    if memory is None:
        text = f"this machine's accelerator ({found.type}) does not tell its memory; give --device-memory GIB"
        raise UserError(f"{text}, or set DS_ACCELERATOR=cpu for a job on CPUs")
    return Device(False, memory, f"this machine's {properties.name}")


def check_device(case: Case) -> Iterator[Finding]:
    config, on_cpu = case.config, case.device.on_cpu
    if case.device.source == GIVEN:
        yield Finding("ok", f"accelerators of {case.device.memory / GIB:g} GiB ({GIVEN})")
    hint = "(for a job on accelerators give the doctor --device-memory GIB)"
    if on_cpu and precision(config, on_cpu) == "bf16":
        where = config.at("train.precision")
        yield Finding("warning", f"{where}: train.precision bf16 is about 11 times slower than fp32 on CPUs {hint}")
    if nothing := moves_nothing(config, on_cpu):
        yield Finding("warning", f"{nothing} {hint}")
    if problem := attention_problem(config, on_cpu):
        elsewhere = case.device.source == GIVEN  # the job runs on another machine, which may have what this one lacks
        yield Finding("warning" if elsewhere else "error", f"{problem} {hint}" if on_cpu else problem)


def check_kernels(case: Case) -> Iterator[Finding]:
    """The backend that computes the experts, and whether this environment can run it."""
    config = case.config
    if config.moe is None:
        return
    import torch

    from ds_moe.moe.backends import BACKENDS, choose_backend

    kind, where = config.moe.experts.backend, config.at("moe.experts.backend")
    on_cpu = case.device.on_cpu
    if kind == "reference":
        yield Finding("warning", f"{where}: moe.experts.backend reference loops over the experts; use auto")
        return
    if not (on_cpu or torch.cuda.is_available()):
        yield Finding("ok", f"experts: backend {kind}; what it needs is looked for where the job runs")
        return
    device = "cpu" if on_cpu else "cuda"
    if kind == "auto":
        dtype = torch.bfloat16 if precision(config, on_cpu) == "bf16" else torch.float32
        chosen, why = choose_backend(device, dtype)
        yield Finding("ok", f"experts: backend {chosen} (auto: {why})")
        return
    obstacle = BACKENDS[kind].obstacle(device)
    if obstacle is not None:
        yield Finding("error", f"{where}: moe.experts.backend {kind}: {obstacle}; or use auto")
        return
    yield Finding("ok", f"experts: backend {kind}: {BACKENDS[kind].made_of()}")


def check_cores(case: Case) -> Iterator[Finding]:
    """Threads and allocator of CPU ranks, as `ds-moe train` and the launch scripts set them."""
    if not case.device.on_cpu:
        return
    settings, cores = cpu_settings(case.world_size), len(os.sched_getaffinity(0))
    shown = ", ".join(f"{name}={value}" for name, value in settings.items() if name.startswith(("OMP", "MALLOC")))
    threads = settings["OMP_NUM_THREADS"]
    yield Finding("ok", f"CPU ranks get {shown}: a share of the {cores} cores each, and freed memory is kept")
    if threads.isdecimal() and int(threads) * case.world_size > max(cores, case.world_size):
        text = f"OMP_NUM_THREADS={threads} x {case.world_size} ranks is more than {cores} cores"
        yield Finding("warning", f"{text}: threads that wait spin, and a run can be 30 times slower; unset it")


def check_deepspeed(case: Case) -> Iterator[Finding]:
    """Conflicts between DeepSpeed JSON and run file, batch sizes, EP size; without any sets `case.zero`."""
    config = case.config
    if is_missing(config):
        return  # parsing the run file has complained already
    hidden_size = case.model.get_text_config().hidden_size if case.model else None
    resolved, complaints = deepspeed_problems(config, case.world_size, case.device.on_cpu, hidden_size, case.experts)
    yield from (Finding("error", complaint) for complaint in complaints)
    if complaints:
        return
    case.zero = zero_plan(resolved)
    train, ep_size = config.train, config.moe.ep_size if config.moe else 1
    accumulated = f"{case.world_size} ranks x {resolved['gradient_accumulation_steps']} accumulated"
    size = f"{train.micro_batch_size} x {accumulated} = {train.global_batch_size}"
    if config.data.packing:
        shared = f", {train.sequence_parallel} ranks a row" if train.sequence_parallel > 1 else ""
        size = f"packed into rows of {config.tokens_per_row} tokens{shared}: {train.global_batch_size}"
    split = f"EP {ep_size} x EDP {case.world_size // ep_size}, ZeRO {case.zero.stage}"
    yield Finding("ok", f"batch: {size} samples a step; {split}, {precision(config, case.device.on_cpu)}")
    if warning := summed_in_bf16(config, case.zero, case.world_size):
        yield Finding("warning", warning)


def check_warmup(case: Case) -> Iterator[Finding]:
    """A warm-up as long as the run, where the run's length follows from the number of records."""
    if case.config.train.steps is None and case.steps is not None:
        problem = warmup_problem(case.config, case.steps)
        if problem is not None:
            yield Finding("error", problem)


def check_intervals(case: Case) -> Iterator[Finding]:
    """Intervals of the run file that are longer than the run, so that nothing ever happens at them."""
    steps = case.steps
    for key in ("train.eval_every", "monitor.log_every", "monitor.heatmap_every", "checkpoint.every"):
        section, _, name = key.partition(".")
        every = getattr(getattr(case.config, section), name)
        if steps is not None and every is not None and every > steps and written(case.config, key):
            text = f"{key} {every} is longer than the run of {steps} steps, so it never comes round"
            yield Finding("warning", f"{case.config.at(key)}: {text}")
