"""Cases of `test_faults.py`, on every rank: a NaN in one of them, checkpoints in the background."""

import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from ds_moe.checkpoint import save as checkpoint
from ds_moe.checkpoint.files import newest_complete
from ds_moe.config.run_file import load_run
from ds_moe.engine.start import start_distributed
from ds_moe.errors import UserError
from ds_moe.faults.signals import Stopped, StopRequest
from ds_moe.moe.loss_free import LossFreeBalancing
from ds_moe.tasks.task import Task
from ds_moe.train import train
from tests.launcher import leave, report

RUN = "tests/runs/faults.yaml"
BAD_RANK = "1"
plain_loss = Task.loss


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
    """`Task.loss`, with what is wrong on one rank at some steps (from 1)."""

    def loss(task, batch, share):
        good, engine = plain_loss(task, batch, share), task.parts.engine
        step = engine.micro_steps // engine.gradient_accumulation_steps() + 1
        return POISONS[kind](good) if os.environ["RANK"] == BAD_RANK and step in steps else good

    return patch.object(Task, "loss", loss)


def slow_writes():
    """Files that take longer than a step."""
    write = checkpoint._write_rank

    def later(*args):
        time.sleep(1.0)
        return write(*args)

    return patch.object(checkpoint, "_write_rank", later)


@contextmanager
def signal_in_evaluation(steps):
    """Rank 1 gets SIGUSR1 when the evaluation after one of the steps has begun, for the first time."""
    evaluate, sent, requests = Task.evaluate, [], []

    def stop_request(*args):
        requests.append(StopRequest(*args))
        return requests[-1]

    def interrupted(task, step, limit, each_batch):
        if os.environ["RANK"] == BAD_RANK and step in steps and step not in sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGUSR1)
            while requests[-1].received is None:
                time.sleep(0.01)
        return evaluate(task, step, limit, each_batch)

    with patch.object(Task, "evaluate", interrupted), patch("ds_moe.training.set_up.StopRequest", stop_request):
        yield


@contextmanager
def worse_evaluations(steps):
    """As `signal_in_evaluation`, but the held-out loss is the number of the step: the first evaluation is the best."""
    evaluate = Task.evaluate

    def worse(*args, **named):
        report = evaluate(*args, **named)
        return replace(report, loss=float(report.step))

    with patch.object(Task, "evaluate", worse), signal_in_evaluation(steps):
        yield


def started_again(config):
    """What a run and its restarts come to: [[step, status] of every stop, result]."""
    stops = []
    while True:
        try:
            return [stops, train(config)]
        except Stopped as stopped:
            path = newest_complete(Path(config.train.output_dir, "checkpoints"))
            stops.append([int(path.name.removeprefix("step_")), stopped.exit_status])


def recording(moved):
    """How many assignments move a bias, by update."""
    move = LossFreeBalancing.move

    def moves(self, counts_E, rate):
        moved.append(int(counts_E.sum()))
        move(self, counts_E, rate)

    return patch.object(LossFreeBalancing, "move", moves)


def main():
    start_distributed(1)
    for name, overrides, fault, steps in json.loads(sys.argv[1]):
        config = load_run(RUN, overrides)
        stopping = {"signal in evaluation": signal_in_evaluation, "worse evaluations": worse_evaluations}
        faults = {"slow writes": slow_writes, **{name: partial(one, steps) for name, one in stopping.items()}}
        moved = []
        with recording(moved), poisoned(fault, steps) if fault in POISONS else faults[fault]():
            try:
                report(**{name: started_again(config) if fault in stopping else train(config)})
            except UserError as error:
                report(**{name: str(error)})
        report(**{f"{name}: assignments": moved})
    leave()


if __name__ == "__main__":
    main()
