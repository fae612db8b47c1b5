"""How processes that load data are started."""

import multiprocessing
from multiprocessing import forkserver, resource_tracker

import torch

from ds_moe.faults.signals import left_to_parent


def start_method(workers: int) -> str | None:
    """For torch's `multiprocessing_context`. None: as torch does it, by a fork of this process.

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
