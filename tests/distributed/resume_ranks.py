"""Ranks of test_resume: several runs in one launch. Arguments: JSON list of [name, overrides, mode]; the run file."""

import json
import os
import sys
from unittest.mock import patch

from safetensors import SafetensorError
from safetensors.torch import save_file

from ds_moe.config.run_file import load_run
from ds_moe.data.stream import TrainStream
from ds_moe.train import train
from ds_moe.training.checkpoints import resume, save_checkpoint
from ds_moe.training.evaluation import evaluate_run
from ds_moe.training.set_up import set_up
from ds_moe.weights import files
from tests.launcher import leave, report

RUN = "tests/runs/resume.yaml"


def _full_disk(tensors, path, metadata=None):
    raise SafetensorError("No space left on device")


def main():
    for name, overrides, mode in json.loads(sys.argv[1]):
        config = load_run(*sys.argv[2:] or [RUN], overrides)
        if mode == "train":
            report(**{name: train(config)["loss"]})
        elif mode == "evaluate":
            evaluate_run(config)
        elif mode == "drop the data position":
            with patch.object(TrainStream, "load_state_dict", lambda self, state: None):
                report(**{name: train(config)["loss"]})
        elif mode == "rank 1 cannot write":
            with patch.object(files, "save_file", _full_disk if os.environ["RANK"] == "1" else save_file):
                train(config)
        elif mode == "load and save":
            run = set_up(config)
            resume(run)
            save_checkpoint(run)
            run.engine.destroy()
    leave()


if __name__ == "__main__":
    main()
