"""The options of `ds-moe plot`."""

import argparse
from pathlib import Path

from ds_moe.config.arguments import Commands

DESCRIBED = """The curves of a run as one picture, from its TensorBoard event files: loss, held-out loss and accuracy,
balance and load of the experts, learning rate, gradient norm and speed. Several runs are compared in one picture. A run
that goes on is drawn as far as it is."""


def add_plot(commands: Commands) -> None:
    parser = commands.add_parser("plot", help="draw the curves of a run, or compare runs", description=DESCRIBED)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN_FOLDER", help="output folder of a run, or its tensorboard folder")
    out = ".png, .svg or .pdf (default: plot.png in RUN_FOLDER; of several runs, in this folder)"
    add("--out", type=Path, metavar="FILE", help=out)
    json = "write every scalar there too: {tag: [[step, value], ...]}, of several runs by folder"
    add("--json", type=Path, metavar="FILE", help=json)
    parser.set_defaults(command=_plot)


def _plot(options: argparse.Namespace) -> int:
    from ds_moe.monitor.plot import plot

    plot(options.runs, options.out, options.json)
    return 0
