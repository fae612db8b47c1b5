"""Cases of `test_faults.py`, on every rank: a NaN in one of them, checkpoints in the background."""

import json
import os
import sys
import time
from unittest.mock import patch

import torch

from ds_moe import checkpoint
from ds_moe.engine import start_distributed
from ds_moe.errors import UserError
from ds_moe.runfile import load_run
from ds_moe.task import Supervised
from ds_moe.train import train
from tests.launcher import leave, report

RUN = "tests/runs/faults.yaml"
BAD_RANK = "1"
plain_loss = Supervised.loss


class NaNBackward(torch.autograd.Function):
    """A finite loss whose gradients are not."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


POISONS = {
    "nan loss": lambda loss: loss * float("nan"),
    "infinite loss": lambda loss: loss + float("inf"),  # whose gradients are finite
    "nan gradient": NaNBackward.apply,
}


def poisoned(kind, steps):
    """`Supervised.loss`, with what is wrong on one rank at some steps (from 1)."""

    def loss(task, run, batch, share):
        good = plain_loss(task, run, batch, share)
        bad = os.environ["RANK"] == BAD_RANK and run.step + 1 in steps
        return POISONS[kind](good) if bad else good

    return patch.object(Supervised, "loss", loss)


def slow_writes():
    """Files that take longer than a step."""
    write = checkpoint._write_rank

    def later(*args):
        time.sleep(1.0)
        return write(*args)

    return patch.object(checkpoint, "_write_rank", later)


def main():
    start_distributed(1)
    for name, overrides, poison, steps in json.loads(sys.argv[1]):
        config = load_run(RUN, overrides)
        with poisoned(poison, steps) if poison in POISONS else slow_writes():
            try:
                report(**{name: train(config)})
            except UserError as error:
                report(**{name: str(error)})
    leave()


if __name__ == "__main__":
    main()
