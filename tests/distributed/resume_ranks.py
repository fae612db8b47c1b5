"""Ranks of test_resume: several runs in one launch. Argument: JSON list of [name, overrides, mode]."""

import json
import sys
from unittest.mock import patch

from ds_moe.data.stream import TrainStream
from ds_moe.runfile import load_run
from ds_moe.train import resume, save_checkpoint, set_up, train
from tests.launcher import report

RUN = "tests/runs/resume.yaml"


def main():
    for name, overrides, mode in json.loads(sys.argv[1]):
        config = load_run(RUN, overrides)
        if mode == "train":
            report(**{name: train(config)["loss"]})
        elif mode == "drop the data position":
            with patch.object(TrainStream, "load_state_dict", lambda self, state: None):
                report(**{name: train(config)["loss"]})
        elif mode == "load and save":
            run = set_up(config)
            resume(run)
            save_checkpoint(run)
            run.engine.destroy()


if __name__ == "__main__":
    main()
