"""`python -m ds_moe.evaluate RUN.yaml [key=value ...] [--from ...]`, started once a rank by `deepspeed` or `torchrun`.

Evaluates a checkpoint or a model on data.eval. The exit status is that of `ds_moe.train`. Functions import what they
need, because `ds-moe --help` shows the options, and is instant.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ds_moe.config.arguments import positive
from ds_moe.errors import UserError, all_in_one

if TYPE_CHECKING:
    from ds_moe.config.run import RunConfig

WEIGHTS = "checkpoint, run folder or model (default: the newest checkpoint of train.output_dir)"
RESULTS = "where the samples go; the result lies beside it as .json (default: eval-NAME.jsonl in train.output_dir)"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", metavar="FOLDER", help=WEIGHTS)
    parser.add_argument("--out", metavar="FILE.jsonl", help=RESULTS)
    parser.add_argument(
        "--samples", type=positive, metavar="K", help="of data.eval, always the same ones (default: all)"
    )


def words_of(options: argparse.Namespace) -> list[str]:
    """The words of `main` for what `add_options` has parsed."""
    given = {"--from": options.source, "--out": options.out, "--samples": options.samples}
    return [str(word) for pair in given.items() if pair[1] is not None for word in pair]


def load(options: argparse.Namespace) -> RunConfig:
    """The run to evaluate. Raises `UserError` where its file or the options cannot be used."""
    from ds_moe.config.check import check_evaluation
    from ds_moe.config.deepspeed import json_problems
    from ds_moe.config.run_file import parse_run

    config, complaints = parse_run(options.run, options.overrides)
    if config is None or (complaints := complaints + json_problems(config)):
        raise all_in_one(complaints)
    check_evaluation(config)
    if options.out is not None and not options.out.endswith(".jsonl"):
        raise UserError(f"--out {options.out} must end in .jsonl: the result is written beside it as .json")
    return config


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m ds_moe.evaluate", description="Evaluate a run on data.eval.")
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # from launchers
    add_options(parser)
    options = parser.parse_intermixed_args(argv)

    from ds_moe.train import status_of
    from ds_moe.training.evaluation import evaluate_run

    return status_of(
        lambda: load(options), lambda config: evaluate_run(config, options.source, options.out, options.samples)
    )


if __name__ == "__main__":
    status = main()

    from ds_moe.train import leave

    leave(status)
