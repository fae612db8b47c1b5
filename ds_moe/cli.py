"""The `ds-moe` command. Heavy libraries are imported by the command that needs them, so that --help is instant."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from ds_moe import __version__
from ds_moe.config.sizes import SIZE, gib
from ds_moe.errors import UserError
from ds_moe.tasks.gate.cli import add_gate

OVERRIDES = "dotted overrides of the run file, e.g. train.lr=1e-4 moe.ep_size=4"


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, without the usage that argparse would print."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help shows the usage)\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code. A `UserError` becomes one line on stderr and code 2."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest:  # overrides behind an option: argparse ends the list of positional arguments at the first option
        strays = [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]
        if strays:
            parser.error(f"unrecognized arguments: {' '.join(strays)}")
        options.overrides += rest
    try:
        return options.command(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ds-moe", description="Train MoE vision-language models on DeepSpeed.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a run under DeepSpeed's launcher")
    _add_training_options(train)
    train.set_defaults(command=_train, task=None)

    doctor = commands.add_parser("doctor", help="say what would fail or be slow, without training")
    doctor.add_argument("run", metavar="RUN.yaml")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    doctor.add_argument("--world", type=_positive, default=1, metavar="N", help="ranks of the job (default 1)")
    doctor.add_argument("--samples", type=_positive, default=64, metavar="K", help="records to decode (default 64)")
    memory = f"of the accelerators the job will have: {SIZE}"
    doctor.add_argument("--device-memory", type=gib, metavar="SIZE", help=memory)
    doctor.set_defaults(command=_doctor)

    export = commands.add_parser("export", help="write a checkpoint as a plain transformers folder")
    export.add_argument("checkpoint", type=Path, metavar="CKPT")
    export.add_argument("out", type=Path, metavar="OUT")
    _add_layout(export)
    export.add_argument("--adapter", action="store_true", help="of a run with LoRA: only the PEFT adapter, unmerged")
    export.set_defaults(command=_export)

    assembly = commands.add_parser("assemble", help="make a Qwen3-VL-MoE of dense Qwen3-VL checkpoints")
    assembly.add_argument("spec", metavar="SPEC.yaml", help="what to make of which checkpoints")
    assembly.add_argument("out", type=Path, metavar="OUT")
    _add_layout(assembly)
    assembly.add_argument("--dry-run", action="store_true", help="only say what would be written")
    assembly.set_defaults(command=_assemble)

    add_gate(commands, _add_training_options, _train)

    version = commands.add_parser("version", help="print versions")
    version.set_defaults(command=_version)
    return parser


def _add_training_options(train: argparse.ArgumentParser) -> None:
    add = train.add_argument
    port = "of rank 0 (default: MASTER_PORT, a free one, or 29500 with a hostfile)"
    restarts = "of a run that crashed, each of which resumes (default 0)"
    add("run", metavar="RUN.yaml")
    add("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    add("--nproc", type=_positive, metavar="N", help="ranks a host (default: all accelerators; 1 on CPU)")
    add("--hostfile", metavar="FILE", help='hosts, one "name slots=N" a line')
    add("--port", type=_positive, metavar="P", help=port)
    add("--max-restarts", type=int, default=0, metavar="N", help=restarts)
    add("--dry-run", action="store_true", help="print the command and stop")


def _add_layout(parser: argparse.ArgumentParser) -> None:
    described = "of the experts (default: hub where the model has it, else memory)"
    parser.add_argument("--layout", choices=("hub", "memory"), help=described)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _train(options: argparse.Namespace) -> int:
    from ds_moe.config.run import other_task
    from ds_moe.config.run_file import load_run
    from ds_moe.launcher.command import plan
    from ds_moe.launcher.processes import FINAL, start

    config = load_run(options.run, options.overrides)  # one complaint here instead of one from every rank
    if options.task is not None and (other := other_task(config, options.task)):
        raise UserError(f"{config.at('task')}: task is {other}; ds-moe gate train trains runs of task gate")
    restarts = options.max_restarts
    while True:
        launch = plan(options.run, options.overrides, options.nproc, options.hostfile, options.port)
        print(f"+ {launch}", flush=True)
        code = 0 if options.dry_run else start(launch, config.train.stop_within_s)
        if code in FINAL or restarts <= 0:
            return code
        print(f"ds-moe: the run ended with {code}; starting again ({restarts} left)", file=sys.stderr, flush=True)
        restarts -= 1


def _doctor(options: argparse.Namespace) -> int:
    from ds_moe.doctor.report import diagnose, report

    findings = diagnose(options.run, options.overrides, options.world, options.samples, options.device_memory)
    return report(findings, sys.stdout)


def _export(options: argparse.Namespace) -> int:
    from ds_moe.export.model import export_adapter, export_checkpoint

    if options.adapter:
        if options.layout:
            raise UserError("--layout is about whole models; leave it out with --adapter")
        folder, parameters = export_adapter(options.checkpoint, options.out)
        print(f"{folder}: a PEFT adapter of {parameters:,} parameters")
        return 0
    written = export_checkpoint(options.checkpoint, options.out, options.layout)
    print(
        f"{written.folder}: {written.parameters:,} parameters, {written.bytes / 1e9:.3g} GB in "
        f"{len(written.files)} file(s), experts in the {written.layout} layout"
    )
    return 0


def _assemble(options: argparse.Namespace) -> int:
    from ds_moe.assembly.assemble import assemble

    assemble(options.spec, options.out, options.layout, dry_run=options.dry_run)
    return 0


def _version(options: argparse.Namespace) -> int:
    from importlib import metadata

    print(f"ds_moe {__version__}")
    for name in ("torch", "deepspeed", "transformers"):
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name} missing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
