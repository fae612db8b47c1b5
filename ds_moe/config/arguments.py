"""What the commands of `ds-moe` have in common.

A room adds its commands in its own `cli.py`, which imports nothing heavy before one of them runs.
"""

import argparse
from collections.abc import Callable

Command = Callable[[argparse.Namespace], int]  # from the options to the exit code
Commands = argparse._SubParsersAction  # what `add_subparsers` returns


def add_run(parser: argparse.ArgumentParser) -> None:
    """The run file and its overrides, as the options `run` and `overrides`."""
    described = "dotted overrides of the run file, e.g. train.lr=1e-4 moe.ep_size=4"
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=described)


def positive(text: str) -> int:
    """The `type` of options that are whole numbers above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def add_layout(parser: argparse.ArgumentParser) -> None:
    """The layout in which a model's experts are written, as the option `layout`."""
    described = "of the experts (default: hub where the model has it, else memory)"
    parser.add_argument("--layout", choices=("hub", "memory"), help=described)
