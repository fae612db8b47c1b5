"""How processes that load data are started, and how many threads each of them has."""

import multiprocessing
import os
from multiprocessing import forkserver, resource_tracker
from typing import Any

import torch

from ds_moe.distributed import ranks_of_host
from ds_moe.faults.signals import leave_to_parent, left_to_parent

MOST_THREADS = 4  # of a process, which is busy enough with what threads make


def loader_options(workers: int) -> dict[str, Any]:
    """What every `DataLoader` here is given beside its data set: single records, and how many processes load them."""
    return {
        "batch_size": None,
        "num_workers": workers,
        "multiprocessing_context": _start_method(workers),
        "worker_init_fn": leave_to_parent,
        "generator": torch.Generator(),  # the default one would make the model's random state depend on loading
    }


def _start_method(workers: int) -> str | None:
    """None: as torch does it, by a fork of this process.

    A fork takes over what CUDA, NCCL and their threads had locked at that moment. Once CUDA runs, loading processes are
    forks of a server that has done nothing but import what they need.
    """
    if not workers or not torch.cuda.is_initialized():
        return None
    multiprocessing.set_forkserver_preload(["ds_moe.data.streaming"])
    resource_tracker.ensure_running()  # the server would start it otherwise, which unblocks signals
    with left_to_parent():
        forkserver.ensure_running()
    return "forkserver"


def image_threads(workers: int) -> int:
    """How many threads a process that loads data has for its images, where a rank has so many loading processes.

    They share what the processes that load leave of the rank's part of this host's cores. A rank that loads by itself
    has at least one: images are decoded while it computes.
    """
    processes = max(workers, 1)
    spare = len(os.sched_getaffinity(0)) // (ranks_of_host() or 1) - processes
    least = 0 if workers else 1
    return min(max(spare // processes, least), MOST_THREADS)
