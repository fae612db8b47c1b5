"""What `ds-moe init` does: look at a model and its data, choose a plan that fits, write a run file and say why."""

import argparse
import re
import shlex
from pathlib import Path

import torch

from ds_moe.config.deepspeed import trains_on_cpu
from ds_moe.config.run import RunConfig
from ds_moe.config.run_file import load_run
from ds_moe.config.sections import ModelConfig
from ds_moe.doctor import plans
from ds_moe.doctor.case import GIB, Device
from ds_moe.doctor.fit import LEAST_BATCH, Fit, Job, fit
from ds_moe.doctor.look import Looked, look_at
from ds_moe.doctor.plans import NODE, Setting
from ds_moe.doctor.run import find_device
from ds_moe.doctor.run_text import run_text
from ds_moe.errors import UserError, one_line
from ds_moe.models.load import model_config
from ds_moe.models.processor import load_processor

ASSUMED_GIB = 80.0  # of a GPU that is not in this machine, where --memory does not tell
BATCH, STEPS = 64, 25  # samples of a step: fewer where an epoch would have fewer than so many steps
ROOM = 1.25  # of data.max_length, for records longer than those that were looked at


def init(options: argparse.Namespace) -> None:
    """Write the run file that the options ask for; print what was chosen, why, and what comes next.

    Raises `UserError` as a run of this model and data would, where no plan fits, and for a file that is there already.
    """
    if options.demo:
        return _demo(options)
    if not options.data:
        raise UserError("give a MODEL and its DATA, or --demo")
    refuse_existing(options.out, options.force)
    device, ranks = job_device(options.gpus, options.memory)
    processor, model = load_processor(options.model), model_config(ModelConfig(path=options.model))
    train = look_at(options.data, "train", processor, model, options.skip_bad)
    held_out = look_at(options.eval, "held-out", processor, model, options.skip_bad) if options.eval else None
    job = Job(options.model, model, ranks, device)
    settings = run_settings(job, [one for one in (train, held_out) if one])
    if options.skip_bad:
        settings["data.on_bad_record"] = "skip"
    samples = min(train.records, max(LEAST_BATCH, min(BATCH, train.records // STEPS)))
    chosen = fit(job, settings, samples, options.lora)
    keys = run_text(job, settings, chosen, f"runs/{options.out.stem}", train, held_out)
    write(options.out, head(options, job) + keys, options.force)
    config = load_run(options.out)
    print(f"{options.out}: {plans.described(chosen.plan)}{', gradient checkpointing' if chosen.checkpointing else ''}")
    print(*(f"  {line}" for line in summary(config, job, chosen, train, held_out)), sep="\n")
    print_next(options.out, config, ranks, None if device.on_cpu else device.memory)


def _demo(options: argparse.Namespace) -> None:
    if given := [
        name for name in ("model", "data", "eval", "gpus", "memory", "lora", "skip_bad") if getattr(options, name)
    ]:
        named = ", ".join(
            name.upper() if name in ("model", "data") else f"--{name.replace('_', '-')}" for name in given
        )
        raise UserError(f"--demo brings a whole run file; leave {named} out")
    shipped = (Path(__file__).resolve().parents[1] / "ds_configs/runs/demo.yaml").read_text()
    what = "a tiny Qwen3-VL-MoE learns to read scans of digits, on 2 ranks"
    write(options.out, re.sub(r"\A(#.*\n)+", f"# The demo: {what}\n", shipped), options.force)
    print(f"{options.out}: {what}")
    print_next(options.out, load_run(options.out), 2, None)


def refuse_existing(out: Path, force: bool) -> None:
    if out.is_symlink():
        raise UserError(f"{out} is a link, through which nothing is written; give --out another name")
    if out.is_dir() or (out.exists() and not force):
        fix = "give --out a file" if out.is_dir() else "--force replaces it, --out writes another file"
        raise UserError(f"{out} is there already; {fix}")


def write(out: Path, text: str, force: bool) -> None:
    refuse_existing(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or one_line(error)}") from error


def job_device(gpus: int | None, memory: float | None) -> tuple[Device, int]:
    """What each rank computes on, and how many there are: `gpus` of `memory` GiB, this machine's, or one CPU rank."""
    on_cpu = trains_on_cpu()
    if gpus is None and on_cpu and memory is not None:
        raise UserError("--memory is that of a GPU, and this machine has none; give --gpus N too")
    if memory is not None:
        device = Device(False, memory * GIB, "--memory")
    elif gpus is not None and on_cpu:
        device = Device(False, ASSUMED_GIB * GIB, "assumed, --memory tells")
    else:
        device = find_device(1, None)
    return device, gpus or (1 if device.on_cpu else torch.accelerator.device_count())


def run_settings(job: Job, data: list[Looked]) -> dict[str, Setting]:
    """Keys that memory depends on and that no plan varies."""
    needed = int(ROOM * max(max(one.lengths) for one in data))
    settings: dict[str, Setting] = {
        "data.max_length": min(-(-needed // 64) * 64, job.model.get_text_config().max_position_embeddings),
        "train.precision": "fp32" if job.device.on_cpu else "bf16",
    }
    if hasattr(job.model, "vision_config"):
        settings["model.freeze"] = ["vision"]
    return settings


def head(options: argparse.Namespace, job: Job) -> str:
    """The comment above the sections."""
    words = ["ds-moe", "init", options.model, options.data, *(["--eval", options.eval] if options.eval else [])]
    words += ["--gpus", str(options.gpus)] if options.gpus else []
    words += ["--memory", f"{options.memory:g}GiB"] if options.memory else []
    words += ["--lora"] if options.lora else []
    kind = "rank on CPUs" if job.device.on_cpu else "GPU"
    ranks = f"{job.ranks} {kind}{'s' if job.ranks > 1 else ''}"
    return (
        f"# For {ranks} with {job.device.memory / GIB:.0f} GiB{' each' if job.ranks > 1 else ''}. Written by\n"
        f"# {shlex.join(words)}\n"
        "# Paths start from the folder in which ds-moe is called.\n"
    )


def summary(config: RunConfig, job: Job, chosen: Fit, train: Looked, held_out: Looked | None) -> list[str]:
    """What was chosen and why, a line each."""
    memory = plans.predicted(config, plans.outline_of(config, job.model), job.ranks, job.device.on_cpu)
    needed, there = sum(memory.device.values()) / GIB, job.device.memory / GIB
    ranks, accumulated = "1 rank" if job.ranks == 1 else f"{job.ranks} ranks", chosen.global_batch // job.ranks
    batch = f"{chosen.micro_batch} x {ranks} x {accumulated // chosen.micro_batch} accumulated"
    lines = [f"data      {train}", *([f"held out  {held_out}"] if held_out else [])]
    lines.append(f"batch     {batch} = {chosen.global_batch} samples a step")
    lines.append(f"memory    about {needed:.1f} GiB a rank; {there:.1f} GiB are there ({job.device.source})")
    if host := sum(memory.host.values()) * min(job.ranks, NODE) / GIB:
        lines.append(f"          and {host:,.0f} GiB of host memory for {min(job.ranks, NODE)} GPUs")
    return lines + [f"why       {line}" for line in chosen.why]


def print_next(out: Path, config: RunConfig, ranks: int, memory: float | None) -> None:
    """The commands that come next; `memory` in bytes is that of a GPU, None on CPUs."""
    file, output = shlex.quote(str(out)), shlex.quote(config.train.output_dir)
    size = f" --device-memory {memory / GIB:.0f}GiB" if memory else ""
    start = " --hostfile HOSTS" if ranks > NODE else f" --nproc {ranks}" if ranks > 1 else ""  # a hostfile has slots
    commands = [f"doctor {file} --world {ranks}{size}", f"train {file}{start}", f"plot {output}"]
    commands += [f"eval {file}{start}"] if config.data.eval else []
    commands.append(f"export {output} exported/")
    print("next:", *(f"  ds-moe {command}" for command in commands), sep="\n")
