"""The options of `ds-moe init`, `ds-moe doctor`, `ds-moe plan` and `ds-moe data prepare`."""

import argparse
import os
import sys
from pathlib import Path

from ds_moe.config.arguments import Commands, add_run, positive
from ds_moe.config.sizes import SIZE, gib

PLAN = """Predict the peak memory of one rank from a model's config alone: no weights, no GPU.

  ds-moe plan qwen3-vl-30b-a3b --gpus 8 --ep-size 8 --zero 3 --checkpointing
  ds-moe plan qwen3-vl-30b-a3b --gpus 8,16,64 --sweep --checkpointing
  ds-moe plan folder/with/config.json/in/it --config run.yaml --gpus 16

A plan fits if it needs no more than 90% of a GPU."""

INIT = """Write a run file for a model and its data, with a plan that fits the GPUs, and say why and what comes next.

  ds-moe init Qwen/Qwen3-VL-30B-A3B-Instruct data/train.jsonl --eval data/held_out.jsonl --gpus 8 --memory 80GB
  ds-moe init folder/with/a/model data/train.jsonl --lora
  ds-moe init --demo

Without --gpus the run is for the accelerators of this machine, or else for one rank on its CPUs."""


PREPARE = """Decode and tokenize the records of a run once, and say what they are like.

  ds-moe data prepare run.yaml
  ds-moe data prepare run.yaml --pixels no data.prepared=shared/prepared

Runs whose data file, limits, template, tokenizer, image processor and library versions are the same use what is written
here, and get the tensors that they would make themselves."""


def add_init(commands: Commands) -> None:
    described = {"description": INIT, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = commands.add_parser("init", help="write a run file for a model and its data", **described)
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="folder or hub id")
    add(
        "data",
        nargs="?",
        metavar="DATA",
        help='conversations: JSONL, Parquet or tar files, a folder, a pattern, hub:OWNER/NAME, or "digits"',
    )
    add("--eval", metavar="FILE", help="held-out conversations")
    add("--out", type=Path, default=Path("run.yaml"), metavar="FILE.yaml", help="(default run.yaml)")
    add("--gpus", type=positive, metavar="N", help="that the run will have (default: those of this machine)")
    add("--memory", type=gib, metavar="SIZE", help=f"of one of them: {SIZE}")
    add("--lora", action="store_true", help="low-rank updates, even where all weights could be trained")
    add("--skip-bad", action="store_true", help="a run that names bad records and leaves them out")
    add("--demo", action="store_true", help="instead of MODEL and DATA: the run file of the demo")
    add("--force", action="store_true", help="replace the file")
    parser.set_defaults(command=_init)


def _init(options: argparse.Namespace) -> int:
    from ds_moe.doctor.new_run import init

    init(options)
    return 0


def add_doctor(commands: Commands) -> None:
    parser = commands.add_parser("doctor", help="say what would fail or be slow, without training")
    add_run(parser)
    parser.add_argument("--world", type=positive, default=1, metavar="N", help="ranks of the job (default 1)")
    parser.add_argument("--samples", type=positive, default=64, metavar="K", help="records to decode (default 64)")
    parser.add_argument("--device-memory", type=gib, metavar="SIZE", help=f"of the job's accelerators: {SIZE}")
    parser.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from ds_moe.doctor.report import diagnose, report

    findings = diagnose(options.run, options.overrides, options.world, options.samples, options.device_memory)
    return report(findings, sys.stdout)


def add_plan(commands: Commands) -> None:
    described = {"description": PLAN, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = commands.add_parser("plan", help="predict the memory of a rank, and which topology fits", **described)
    add, whole = parser.add_argument, {"type": positive, "metavar": "N"}
    models = "qwen3-vl-30b-a3b (default without --config), qwen3-vl-235b-a22b, or a folder with a config.json"
    add("model", nargs="?", metavar="MODEL", help=models)
    add("--config", type=Path, metavar="RUN.yaml", help="a run file, whose settings hold in place of the options'")
    add("--gpus", default="8", metavar="N,N", help="numbers of ranks (default 8)")
    add("--memory", type=gib, default=80.0, metavar="SIZE", help=f"of one GPU (default 80): {SIZE}")
    add("--ep-size", default=1, **whole, help="ranks that share one copy of the experts (default 1)")
    add("--zero", type=int, choices=(1, 2, 3), default=3, help="ZeRO stage (default 3)")
    add("--offload", action="store_true", help="optimizer state in host memory (ZeRO-3)")
    add("--lora", default=0, **whole, help="rank of updates of attention and experts (default: all is trained)")
    add("--sequence", default=4096, **whole, help="tokens of a sample (default 4096)")
    add("--micro-batch", **whole, help="samples of a rank and forward (default 1)")
    add("--rows", **whole, help="packed rows of N tokens instead (data.packing, train.tokens_per_micro_batch)")
    add("--sequence-parallel", default=1, **whole, help="ranks that share each of these rows (default 1)")
    add("--checkpointing", action="store_true", help="gradient checkpointing")
    add("--offload-activations", action="store_true", help="with what it keeps in host memory")
    add("--freeze-vision", action="store_true", help="freeze the vision tower")
    add("--precision", choices=("bf16", "fp32"), default="bf16")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: of hidden matrices (default adamw)")
    add("--sweep", action="store_true", help="every EP size, ZeRO stage, offload and LoRA of each number of GPUs")
    add("--json", type=Path, metavar="FILE", help="also write figures and settings here")
    parser.set_defaults(command=_plan)


def _plan(options: argparse.Namespace) -> int:
    from ds_moe.doctor.plan_command import plan

    plan(options)
    return 0


def add_data(commands: Commands) -> None:
    group = commands.add_parser("data", help="the data of a run: prepare")
    described = {"description": PREPARE, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parts = group.add_subparsers(required=True, metavar="WHAT")
    parser = parts.add_parser("prepare", help="encode the records once, with a report", **described)
    add_run(parser)
    stored = "whether images are stored, as bytes (default auto: up to 16 GiB of them)"
    parser.add_argument("--pixels", choices=("auto", "yes", "no"), default="auto", help=stored)
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (default: as many as CPUs)")
    parser.set_defaults(command=_prepare)


def _prepare(options: argparse.Namespace) -> int:
    from ds_moe.doctor.prepare_command import prepare_data

    pixels = {"auto": None, "yes": True, "no": False}[options.pixels]
    prepare_data(options.run, options.overrides, pixels, options.workers or len(os.sched_getaffinity(0)))
    return 0
