"""One rank that leaves a run in the way it is told: WAY, number of data workers, output folder."""

import os
import resource
import signal
import sys
from unittest.mock import patch

from ds_moe import train

RUN = "tests/runs/resume.yaml"


def third_step(error):
    """`train_step`, whose third call raises."""
    calls, step = [], train.train_step

    def failing(run, steps):
        calls.append(1)
        if len(calls) == 3:
            error()
        return step(run, steps)

    return patch.object(train, "train_step", failing)


def crash():
    raise RuntimeError("a bug of ours")


def main():
    way, workers, output = sys.argv[1:]
    arguments = [RUN, f"train.output_dir={output}", f"data.num_workers={workers}", "moe.ep_size=1", "train.steps=4"]
    arguments += ["train.warmup_steps=1", "train.micro_batch_size=2", "train.global_batch_size=2", "checkpoint.every=2"]
    if way == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    ways = {"crash": crash, "signal": lambda: os.kill(os.getpid(), signal.SIGTERM)}
    with third_step(ways.get(way, lambda: None)):
        status = train.main([*arguments, *(["data.train=" + os.environ["BAD_DATA"]] if way == "bad record" else [])])
    train.leave(status)


if __name__ == "__main__":
    main()
