"""The options of `ds-moe gate train | eval | predict | export | freeze`. A command imports what it needs when run."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ds_moe.config.arguments import Command, Commands, add_run


def add_gate(
    commands: Commands,
    add_training_options: Callable[[argparse.ArgumentParser], None],
    train: Command,
) -> None:
    """Add this group of commands to `ds-moe`. `train` and its options are those of `ds-moe train`."""
    group = commands.add_parser("gate", help="a learned gate over LoRA adapters: train, eval, predict, export, freeze")
    parts = group.add_subparsers(required=True, metavar="WHAT")

    training = parts.add_parser("train", help="train a run of task gate under DeepSpeed's launcher")
    add_training_options(training)
    training.set_defaults(command=train, task="gate")

    evaluate = parts.add_parser("eval", help="routing accuracy, confusion, calibration and baselines on data.eval")
    _add_source(evaluate)
    evaluate.add_argument("--json", metavar="FILE", help="write everything there too")
    evaluate.set_defaults(
        command=_run, work=lambda do, given: do.evaluate_gate(given.run, given.overrides, given.source, given.json)
    )

    predict = parts.add_parser("predict", help="one JSON line a request: its adapter and how probable that is")
    _add_source(predict)
    predict.add_argument("--requests", required=True, metavar="FILE", help="JSONL of messages; answers are not read")
    predict.set_defaults(
        command=_run, work=lambda do, given: do.predict(given.run, given.overrides, given.source, given.requests)
    )

    export = parts.add_parser("export", help="write router, adapters and, if asked, a routing manifest for serving")
    export.add_argument("source", type=Path, metavar="RUN_FOLDER", help="output folder or checkpoint of a gate's run")
    export.add_argument("out", type=Path, metavar="OUT")
    export.add_argument("--manifest", metavar="REQUESTS", help="JSONL of requests to route into OUT/manifest.json")
    export.set_defaults(command=_run, work=lambda do, given: do.export(given.source, given.out, given.manifest))

    freeze = parts.add_parser("freeze", help="write one plain PEFT adapter: the adapters at constant weights")
    freeze.add_argument("source", type=Path, metavar="RUN_FOLDER")
    freeze.add_argument("out", type=Path, metavar="OUT")
    freeze.add_argument("--weights", nargs="+", required=True, metavar="NAME=W", help="of each adapter; others have 0")
    freeze.set_defaults(command=_run, work=lambda do, given: do.freeze(given.source, given.out, given.weights))


def _add_source(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--from", dest="source", metavar="FOLDER", help="checkpoint, run or exported gate")


def _run(options: argparse.Namespace) -> int:
    """Run `options.work`, which gets commands.py and the options."""
    from ds_moe.tasks.gate import commands

    options.work(commands, options)
    return 0
