"""What the ranks of every contender do alike: they wait for their turn, take its steps, and write what these took.

Contenders are jobs of their own, all alive at once; of them one works at a time. An earlier build's ranks import this
module too, so it imports nothing of ds_moe.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist

from tools.bench.resident import new_peak, resident

POLL_S = 0.02
END = "end"


@dataclass
class Step:
    """One optimizer step over a global batch."""

    loss: float  # mean over the labels of all ranks
    grad_norm: float
    tokens: int  # real ones, of all ranks
    micro_steps: int
    seconds: float = 0.0  # of the slowest rank


@dataclass
class Turn:
    """Steps over all global batches of the benchmark, once each."""

    steps: list[Step]
    peak_bytes: list[int]  # of each rank: resident, largest during the turn


def take_turns(step: Callable[[], Step], batches: int, folder: Path) -> None:
    """Until the word is END: wait for `<turn>.go` in the folder, take a step a global batch, write `<turn>.done`.

    Between turns others get the memory, so each begins with a step that is not timed.

    Args:
        step: takes the global batches one after the other, over and over.
    """
    taken = 0
    for turn in count():
        while not (go := folder / f"{turn}.go").exists():
            time.sleep(POLL_S)
        if go.read_text() == END:
            return
        new_peak()
        step()
        steps = {(taken + 1 + number) % batches: timed(step) for number in range(batches)}
        taken += 1 + batches
        peaks: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(peaks, resident("VmHWM"))
        if dist.get_rank() == 0:
            in_order = [steps[batch] for batch in range(batches)]
            write(folder / f"{turn}.done", json.dumps(asdict(Turn(in_order, peaks))))
        new_peak()


def timed(step: Callable[[], Step]) -> Step:
    """The step, all ranks having started together."""
    dist.barrier()
    began = time.perf_counter()
    found = step()
    seconds = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    found.seconds = seconds.item()
    return found


def write(file: Path, text: str) -> None:
    """The whole text or none: others wait for the file."""
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(text)
    part.replace(file)
