"""Ranks of test_evaluate: trainings, exports and evaluations in one launch. Argument: JSON list of [name, mode, ...].

train overrides | export source, out | eval overrides, source, out, samples
Reports by name what training put into result.json, what an evaluation returned, and how its engine was built.
"""

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from ds_moe.config.run_file import load_run
from ds_moe.export.model import export_checkpoint
from ds_moe.train import train
from ds_moe.training import evaluation
from tests.launcher import leave, report

RUN = "tests/runs/resume.yaml"


def evaluate(name, overrides, source, out, samples=None):
    built = []

    def build(model, ds_config):
        engine = build_without_optimizer(model, ds_config)
        built.append({"optimizer": type(engine.optimizer).__name__, "basic": engine.basic_optimizer is not None})
        return engine

    build_without_optimizer = evaluation.build_without_optimizer
    with patch.object(evaluation, "build_without_optimizer", build):
        result = evaluation.evaluate_run(load_run(RUN, overrides), source, out, samples)
    report(**{name: {**result, "engine": built[0]}})


def main():
    for name, mode, *arguments in json.loads(sys.argv[1]):
        if mode == "train":
            result = train(load_run(RUN, *arguments))
            report(**{name: result})
        elif mode == "export":
            if os.environ["RANK"] == "0":
                export_checkpoint(*map(Path, arguments))
            dist.barrier()
        else:
            evaluate(name, *arguments)
    leave()


if __name__ == "__main__":
    main()
