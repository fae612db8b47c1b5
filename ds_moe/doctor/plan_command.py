"""Predict the peak memory of one rank from a model's config alone: no weights, no GPU.

    python -m ds_moe.doctor.plan_command qwen3-vl-30b-a3b --gpus 8 --ep-size 8 --zero 3 --checkpointing
    python -m ds_moe.doctor.plan_command qwen3-vl-30b-a3b --gpus 8,16,64 --sweep --checkpointing
    python -m ds_moe.doctor.plan_command folder/with/config.json/in/it --config run.yaml --gpus 16

A plan fits if it needs no more than 90% of a GPU.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from transformers import PretrainedConfig

from ds_moe.config.run_file import load_run
from ds_moe.config.sizes import SIZE, gib
from ds_moe.doctor import plans
from ds_moe.doctor.plans import BUNDLED, NODE, Forecast, Plan, Setting
from ds_moe.errors import UserError
from ds_moe.memory.predict import BUSY, GIB


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, whole = parser.add_argument, {"type": int, "metavar": "N"}
    add("model", nargs="?", default="qwen3-vl-30b-a3b", help=f"{', '.join(BUNDLED)}, or a folder with a config.json")
    add("--config", type=Path, metavar="RUN.yaml", help="a run file, whose settings hold in place of the options'")
    add("--gpus", default="8", metavar="N,N", help="numbers of ranks (default 8)")
    add("--memory", type=gib, default=80.0, metavar="SIZE", help=f"of one GPU (default 80): {SIZE}")
    add("--ep-size", default=1, **whole, help="ranks that share one copy of the experts (default 1)")
    add("--zero", type=int, choices=(1, 2, 3), default=3, help="ZeRO stage (default 3)")
    add("--offload", action="store_true", help="optimizer state in host memory (ZeRO-3)")
    add("--lora", default=0, **whole, help="rank of updates of attention and experts; 0: all is trained (default)")
    add("--sequence", default=4096, **whole, help="tokens of a sample (default 4096)")
    add("--micro-batch", default=1, **whole, help="samples of a rank and forward (default 1)")
    add("--checkpointing", action="store_true", help="gradient checkpointing")
    add("--freeze-vision", action="store_true", help="freeze the vision tower")
    add("--precision", choices=("bf16", "fp32"), default="bf16")
    add("--sweep", action="store_true", help="every EP size, ZeRO stage, offload and LoRA of each number of GPUs")
    add("--json", type=Path, metavar="FILE", help="also write figures and settings here")
    return parser


def settings_of(options: argparse.Namespace, model: PretrainedConfig) -> dict[str, Setting]:
    """The dotted keys of a run file that the options stand for."""
    settings: dict[str, Setting] = {
        "data.max_length": options.sequence,
        "train.micro_batch_size": options.micro_batch,
        "train.gradient_checkpointing": options.checkpointing,
        "train.precision": options.precision,
    }
    if options.freeze_vision:
        if not hasattr(model, "vision_config"):
            raise UserError("--freeze-vision: this model has no vision tower")
        settings["model.freeze"] = ["vision"]
    return settings


def counts(text: str) -> list[int]:
    """The numbers of GPUs that `--gpus` lists."""
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise UserError(f"--gpus {text}: must be whole numbers above 0, separated by commas")
    return [int(part) for part in text.split(",")]


def one(options: argparse.Namespace, model: PretrainedConfig, gpus: int, console: Console) -> Forecast:
    """Predict and print a single plan, or a run file."""
    plan = Plan(gpus, options.ep_size, options.zero, options.offload, options.lora)
    if options.config:
        config = load_run(options.config)
        plan = Plan(gpus, config.moe.ep_size if config.moe else 1, 0)
    else:
        config = plans.run_of(plan, options.model, model, settings_of(options, model))
    if plan.gpus % plan.ep_size:
        raise UserError(f"--gpus {gpus}: EP {plan.ep_size} does not divide them")
    memory = plans.predicted(config, plans.outline_of(config, model), gpus)
    forecast = Forecast(plan, memory, sum(memory.device.values()) <= BUSY * options.memory * GIB)
    named = str(options.config) if options.config else plans.described(plan)
    console.print(f"{options.model} on {gpus} GPUs of {options.memory:g} GiB, {named}; predicted:", highlight=False)
    console.print(*memory.table(), "fits" if forecast.fits else "DOES NOT FIT", sep="\n", highlight=False)
    return forecast


def swept(options: argparse.Namespace, model: PretrainedConfig, gpus: list[int], console: Console) -> dict[str, object]:
    """Predict and print every plan for each number of GPUs; the report without the model's name."""
    if options.config:
        raise UserError("--sweep varies what --config would fix: give one of them")
    settings = settings_of(options, model)
    found = plans.sweep(options.model, model, settings, gpus, options.memory * GIB, options.lora or 16)
    shown = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in settings.items())
    written: dict[int, list[dict[str, object]]] = {}
    for count, forecasts in found.items():
        console.print(plans.sweep_table(count, forecasts, f"{options.model}, {shown}"))
        best = plans.recommended(forecasts)
        console.print(f"{count} GPUs: {advice(best, count)}\n", highlight=False)
        written[count] = [plans.as_json(forecast) for forecast in forecasts]
    return {"settings": settings, "memory_gib": options.memory, "gpus": written}


def advice(best: Forecast | None, gpus: int) -> str:
    """The recommended plan in words, with the memory that its hosts must have besides."""
    if best is None:
        return "nothing fits"
    host = sum(best.memory.host.values()) * min(gpus, NODE) / GIB
    return plans.described(best.plan) + (f"; a host of {min(gpus, NODE)} GPUs needs {host:,.0f} GiB" if host else "")


def run(options: argparse.Namespace, console: Console) -> dict[str, object]:
    """Do what the options ask; the report for `--json`."""
    model, gpus = plans.read_model(options.model), counts(options.gpus)
    if options.sweep:
        return {"model": options.model, **swept(options, model, gpus, console)}
    return {"model": options.model, "plans": [plans.as_json(one(options, model, count, console)) for count in gpus]}


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 170)  # no wrapped columns in a log file
    try:
        report = run(options, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
