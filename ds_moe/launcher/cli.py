"""The options of `ds-moe train` and `ds-moe eval`, and what they do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ds_moe import evaluate
from ds_moe.config.arguments import Commands, add_run, positive
from ds_moe.errors import UserError, all_in_one

if TYPE_CHECKING:
    from ds_moe.config.run import RunConfig


def add_train(commands: Commands) -> None:
    parser = commands.add_parser("train", help="train a run under DeepSpeed's launcher")
    add_training_options(parser)
    parser.set_defaults(command=train, task=None)


def add_eval(commands: Commands) -> None:
    parser = commands.add_parser("eval", help="held-out loss and answers of a checkpoint, run or model")
    _add_launch_options(parser)
    evaluate.add_options(parser)
    parser.set_defaults(command=_evaluate)


def add_training_options(parser: argparse.ArgumentParser) -> None:
    _add_launch_options(parser)
    restarts = "of a run that crashed, each of which resumes (default 0)"
    parser.add_argument("--max-restarts", type=int, default=0, metavar="N", help=restarts)


def _add_launch_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    port = "of rank 0 (default: MASTER_PORT, a free one, or 29500 with a hostfile)"
    add_run(parser)
    add("--nproc", type=positive, metavar="N", help="ranks a host (default: all accelerators; 1 on CPU)")
    add("--hostfile", metavar="FILE", help='hosts, one "name slots=N" a line')
    add("--port", type=positive, metavar="P", help=port)
    add("--dry-run", action="store_true", help="print the command and stop")


def train(options: argparse.Namespace) -> int:
    """Start the ranks, and start them again after a crash; the exit code of the last start."""
    from ds_moe.config.deepspeed import deepspeed_problems, json_problems, trains_on_cpu
    from ds_moe.config.run import other_task
    from ds_moe.config.run_file import parse_run
    from ds_moe.launcher.command import plan, ranks_here
    from ds_moe.launcher.processes import FINAL, start

    config, complaints = parse_run(options.run, options.overrides)
    if config is None or (complaints := complaints + json_problems(config)):
        raise all_in_one(complaints)  # here once, instead of by every rank
    if options.task is not None and (other := other_task(config, options.task)):
        raise UserError(f"{config.at('task')}: task is {other}; ds-moe gate train trains runs of task gate")
    if not (options.hostfile or options.dry_run) and (complaints := list(_missing(config, "train", "eval"))):
        raise all_in_one(complaints)
    if not (options.hostfile or options.dry_run) and (ranks := ranks_here(options.nproc)) > 1:
        experts = None
        if config.moe and ranks % config.moe.ep_size:  # what is advised instead must divide the experts, too
            from ds_moe.models.load import experts_of

            experts = experts_of(config.model)
        if complaints := deepspeed_problems(config, ranks, trains_on_cpu(), experts=experts)[1]:
            raise all_in_one(complaints)
    restarts = options.max_restarts
    while True:
        launch = plan(options.run, options.overrides, options.nproc, options.hostfile, options.port)
        print(f"+ {launch}", flush=True)
        code = 0 if options.dry_run else start(launch, config.train.stop_within_s)
        if code in FINAL or restarts <= 0:
            return code
        print(f"ds-moe: the run ended with {code}; starting again ({restarts} left)", file=sys.stderr, flush=True)
        restarts -= 1


def _missing(config: RunConfig, *splits: str) -> Iterator[str]:
    """A complaint about each data source without files here, and about kernels of attention that are not.

    What a dataset of the hub holds is left to the ranks, which may have to download it.
    """
    from ds_moe.config.check import attention_problem
    from ds_moe.config.deepspeed import trains_on_cpu
    from ds_moe.config.sections import DIGITS, sources_of
    from ds_moe.config.sources import HUB
    from ds_moe.data.sources.files import local_files

    for key in splits:
        for source in sources_of(getattr(config.data, key)):
            if source.path == DIGITS or source.path.startswith(HUB):
                continue
            try:
                local_files(source)
            except UserError as error:
                yield f"{config.at(f'data.{key}')}: data.{key} {str(error).removeprefix('data: ')}"
    # Only a run that asks for them pays for the import of torch, which the last answer needs.
    if config.model.attention == "flash_attention_2" and (problem := attention_problem(config, trains_on_cpu())):
        yield problem


def _evaluate(options: argparse.Namespace) -> int:
    from ds_moe.launcher.command import plan
    from ds_moe.launcher.processes import start

    config = evaluate.load(options)  # one complaint here instead of one from every rank
    if not (options.hostfile or options.dry_run) and (complaints := list(_missing(config, "eval"))):
        raise all_in_one(complaints)
    words = [*options.overrides, *evaluate.words_of(options)]
    launch = plan(options.run, words, options.nproc, options.hostfile, options.port, evaluate.__name__)
    print(f"+ {launch}", flush=True)
    return 0 if options.dry_run else start(launch, config.train.stop_within_s)
