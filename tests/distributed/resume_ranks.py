"""Ranks of test_resume: several runs in one launch. Arguments: JSON list of [name, overrides, breakage]."""

import json
import sys
from unittest.mock import patch

from ds_moe.data.stream import TrainStream
from ds_moe.runfile import load_run
from ds_moe.train import train
from tests.launcher import report

RUN = "tests/runs/resume.yaml"


def main():
    for name, overrides, breakage in json.loads(sys.argv[1]):
        config = load_run(RUN, overrides)
        if breakage == "data position dropped":
            with patch.object(TrainStream, "load_state_dict", lambda self, state: None):
                result = train(config)
        else:
            result = train(config)
        report(**{name: result["loss"]})


if __name__ == "__main__":
    main()
