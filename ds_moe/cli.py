"""The `ds-moe` command. Rooms add their commands, which import heavy libraries when they run: --help is instant."""

import argparse
import sys
from collections.abc import Iterator
from typing import NoReturn

from ds_moe import __version__
from ds_moe.assembly.cli import add_assemble
from ds_moe.config.arguments import Commands
from ds_moe.doctor.cli import add_data, add_doctor, add_init, add_plan
from ds_moe.errors import UserError, printed
from ds_moe.export.cli import add_export
from ds_moe.launcher.cli import add_eval, add_train, add_training_options, train
from ds_moe.monitor.cli import add_plot
from ds_moe.tasks.gate.cli import add_gate
from ds_moe.tasks.rl.cli import add_rollouts

# What stands for the words of an argument that name no file or folder; all others are completed as such.
NO_FILES = {"COMMAND", "WHAT", "N", "N,N", "K", "P", "T", "SIZE", "NAME", "NAME=W", "TOKEN", "key=value"}


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, without the usage that argparse would print."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help shows the usage)\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code. A `UserError` becomes lines on stderr, mostly one, and code 2."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest:  # overrides behind an option: argparse ends the list of positional arguments at the first option
        strays = [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]
        if strays:
            keys = "overrides" in options and any(map(_is_key, strays))
            hint = "; keys of the run file are given as train.lr=1e-4, without dashes" if keys else ""
            parser.error(f"unrecognized arguments: {' '.join(strays)}{hint}")
        options.overrides += rest
    try:
        return options.command(options)
    except UserError as error:
        print(printed(error), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ds-moe", description="Train MoE vision-language models on DeepSpeed.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_init(commands)
    add_train(commands)
    add_eval(commands)
    add_doctor(commands)
    add_plan(commands)
    add_data(commands)
    add_plot(commands)
    add_export(commands)
    add_assemble(commands)
    add_gate(commands, add_training_options, train)
    add_rollouts(commands)
    _add_completion(commands)
    _add_version(commands)
    return parser


def _is_key(word: str) -> bool:
    """Whether an option is a key of the run file, or what other trainers call one: --train.lr, --learning_rate=1e-4."""
    from ds_moe.config.habits import HABITS
    from ds_moe.config.run_file import ALL_KEYS

    name = word.removeprefix("--").partition("=")[0].replace("-", "_")
    return word.startswith("--") and (name in HABITS or any(f".{key}".endswith(f".{name}") for key in ALL_KEYS))


def _add_version(commands: Commands) -> None:
    commands.add_parser("version", help="print versions").set_defaults(command=_version)


def _version(options: argparse.Namespace) -> int:
    from importlib import metadata

    print(f"ds_moe {__version__}")
    for name in ("torch", "deepspeed", "transformers"):
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name} missing")
    return 0


def _add_completion(commands: Commands) -> None:
    described = 'print a script that completes words of this command, e.g. eval "$(ds-moe completion bash)"'
    parser = commands.add_parser("completion", help="print a script for completion in a shell", description=described)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    parser.set_defaults(command=_completion)


def _completion(options: argparse.Namespace) -> int:
    import shtab

    parser = _parser()
    for argument in all_arguments(parser):
        if names_file(argument):
            argument.complete = shtab.FILE
    print(shtab.complete(parser, options.shell))
    return 0


def all_arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a command and of the commands below it."""
    for argument in parser._actions:
        yield argument
        if isinstance(argument, Commands):
            for below in argument.choices.values():
                yield from all_arguments(below)


def names_file(argument: argparse.Action) -> bool:
    """Whether the words of an argument are completed as files; `NO_FILES` says of which they are not."""
    return bool(argument.metavar) and argument.metavar not in NO_FILES


if __name__ == "__main__":
    sys.exit(main())
