"""Joins the job that the launcher started, and binds this process to its device."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ds_moe.config.divisors import ep_size_problem
from ds_moe.distributed import Topology
from ds_moe.engine import cpu as ops
from ds_moe.errors import UserError


def on_cpu() -> bool:
    """Whether DeepSpeed has chosen the CPU as its accelerator."""
    return get_accelerator().device_name() == "cpu"


def start_distributed(ep_size: int, experts: Callable[[], int | None] = lambda: None) -> Topology:
    """Join the job that the launcher started, or make one of a single process, and bind this process to its device.

    Raises `UserError` where `ep_size` does not divide the number of processes; what would must divide the model's
    `experts`, too.
    """
    ops.use_environment()
    ops.share_cores()
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    local_rank = int(os.environ["LOCAL_RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size % ep_size:
        raise UserError(ep_size_problem(ep_size, world_size, experts(), of="ranks"))
    # DeepSpeed 0.19 uses old names of collectives, about which torch 2.13 warns at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not on_cpu():
        get_accelerator().set_device(local_rank)
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)
    if on_cpu():
        _unlink_shared_memory()
    device = torch.device(get_accelerator().device_name(local_rank) if not on_cpu() else "cpu")
    return Topology(dist.get_rank(), dist.get_world_size(), local_rank, ep_size, device)


def _unlink_shared_memory() -> None:
    """Let the shared memory of DeepSpeed's CPU ranks (66 MiB each, shm.cpp) end with their processes.

    DeepSpeed 0.19 never removes its files from /dev/shm, so the memory of every finished process would stay in use.
    """
    dist.barrier()  # after it, every rank has opened the files of all others, and may remove its own
    place = (str(os.getuid()), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], str(dist.get_rank()))
    Path("/dev/shm", "_".join(("deepspeed_allreduce_buffer", *place))).unlink(missing_ok=True)
