"""What `ds-moe plan` does: predict and print one plan, a run file, or every plan."""

import argparse
import json
import sys

from rich.console import Console
from transformers import PretrainedConfig

from ds_moe.config.rules.model import expert_count
from ds_moe.config.run_file import load_run
from ds_moe.doctor import plans
from ds_moe.doctor.case import Device
from ds_moe.doctor.plans import NODE, Forecast, Plan, Setting
from ds_moe.errors import UserError, one_line
from ds_moe.memory.predict import GIB
from ds_moe.models.load import model_config


def settings_of(options: argparse.Namespace, model: PretrainedConfig) -> dict[str, Setting]:
    """The dotted keys of a run file that the options stand for."""
    settings: dict[str, Setting] = {
        "data.max_length": options.sequence,
        "train.gradient_checkpointing": options.checkpointing,
        "train.precision": options.precision,
        "train.optimizer": options.optimizer,
    }
    if options.offload_activations:
        if not options.checkpointing:
            raise UserError("--offload-activations moves what --checkpointing keeps: give both")
        settings["train.offload_activations"] = True
    if options.rows is None:
        settings["train.micro_batch_size"] = options.micro_batch or 1
    elif options.micro_batch is not None:
        raise UserError("--rows packs samples, of which --micro-batch would be a number: give one of them")
    elif options.rows < options.sequence:
        raise UserError(f"--rows {options.rows} is less than --sequence {options.sequence}: a sample is never cut")
    else:
        settings |= {"data.packing": True, "train.tokens_per_micro_batch": options.rows}
    if options.sequence_parallel > 1:
        heads = model.get_text_config().num_attention_heads
        if options.rows is None:
            raise UserError(f"--sequence-parallel {options.sequence_parallel} shares packed rows: give --rows too")
        if heads % options.sequence_parallel:
            raise UserError(f"--sequence-parallel {options.sequence_parallel} does not divide {heads} attention heads")
        settings["train.sequence_parallel"] = options.sequence_parallel
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
    fits = plans.ep_sizes(model, gpus)
    if plan.ep_size not in fits:
        what = f"{gpus} GPUs and the model's {expert_count(model)} experts" if expert_count(model) else "a dense model"
        raise UserError(f"EP {plan.ep_size} does not suit {what}; use {' or '.join(map(str, fits))}")
    device = Device(False, options.memory * GIB, "--memory")
    forecast = plans.forecast(plan, config, plans.outline_of(config, model), device)
    named = str(options.config) if options.config else plans.described(plan)
    console.print(f"{options.model} on {gpus} GPUs of {options.memory:g} GiB, {named}; predicted:", highlight=False)
    console.print(*forecast.memory.table(), "fits" if forecast.fits else "DOES NOT FIT", sep="\n", highlight=False)
    if config.data.packing:
        found = f"rows of up to {forecast.row} tokens fit" if forecast.row else "no row for a whole sample fits"
        console.print(f"{found} (train.tokens_per_micro_batch)", highlight=False)
    return forecast


def swept(options: argparse.Namespace, model: PretrainedConfig, gpus: list[int], console: Console) -> dict[str, object]:
    """Predict and print every plan for each number of GPUs; the report without the model's name."""
    settings = settings_of(options, model)
    device = Device(False, options.memory * GIB, "--memory")
    found = plans.sweep(options.model, model, settings, gpus, device, options.lora or 16)
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


def plan(options: argparse.Namespace) -> None:
    """Do what the options ask; with `--json` write the report too."""
    console = Console(width=None if sys.stdout.isatty() else 170)  # no wrapped columns in a log file
    if options.sweep and options.config:
        raise UserError("--sweep varies what --config would fix: give one of them")
    gpus = counts(options.gpus)
    options.model, model = _named_model(options)
    if options.sweep:
        report = swept(options, model, gpus, console)
    else:
        report = {"plans": [plans.as_json(one(options, model, count, console)) for count in gpus]}
    if options.json:
        try:
            options.json.write_text(json.dumps({"model": options.model, **report}, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write --json {options.json}: {error.strerror or one_line(error)}") from error


def _named_model(options: argparse.Namespace) -> tuple[str, PretrainedConfig]:
    """The model that the options name, else that of the run file, else the smaller bundled one."""
    if options.model is None and options.config:
        section = load_run(options.config).model
        return str(section.preset or section.path), model_config(section)
    name = options.model or next(iter(plans.BUNDLED))
    return name, plans.read_model(name)
