"""Joins the job that the launcher started, and binds this process to its device."""

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from ds_moe.config.divisors import ep_size_problem, row_sharing_problem
from ds_moe.distributed import Topology
from ds_moe.engine import cpu as ops
from ds_moe.errors import UserError

LEAST_PATIENCE_S = 2 * 3600  # a checkpoint of 3 TB takes most of an hour at 1 GB/s
ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}  # torch's variables for its allocator, old and new


def on_cpu() -> bool:
    """Whether DeepSpeed has chosen the CPU as its accelerator."""
    return get_accelerator().device_name() == "cpu"


def start_distributed(
    ep_size: int,
    experts: Callable[[], int | None] = lambda: None,
    watchdog_s: float = 0.0,
    sequence_parallel: int = 1,
) -> Topology:
    """Join the job that the launcher started, or make one of a single process, and bind this process to its device.

    Collectives wait longer than `watchdog_s`, see `patience`. Raises `UserError` where `ep_size` does not divide the
    number of processes, or `sequence_parallel` does not; an EP size that would must divide the model's `experts`, too.
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
    if problem := row_sharing_problem(sequence_parallel, world_size):
        raise UserError(problem)
    # DeepSpeed 0.19 uses old names of collectives, about which torch 2.13 warns at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not on_cpu():
        use_expandable_segments()
        get_accelerator().set_device(local_rank)
    backend = get_accelerator().communication_backend_name()
    deepspeed.init_distributed(dist_backend=backend, timeout=patience(watchdog_s), verbose=False)
    if on_cpu():
        _unlink_shared_memory()
    device = torch.device(get_accelerator().device_name(local_rank) if not on_cpu() else "cpu")
    return Topology(dist.get_rank(), dist.get_world_size(), local_rank, ep_size, device, sequence_parallel)


def patience(watchdog_s: float) -> timedelta:
    """How long a collective may wait for other ranks.

    It is the watchdog that ends a job, because it knows which ranks move and names the one that does not. NCCL's own
    limit of 10 minutes would abort ranks at the moment at which the watchdog speaks, and ranks that wait for one that
    is writing a large checkpoint. What hangs before the watchdog times anything ends by this limit.
    """
    return timedelta(seconds=max(2 * watchdog_s, LEAST_PATIENCE_S))


def share_patience() -> None:
    """Give every group of this process the time limit of the group of all, once DeepSpeed has made its groups.

    torch 2.13 gives a new group its default, 10 minutes with NCCL, whatever the group of all has.
    """
    of_all = distributed_c10d._get_default_group()
    limit = of_all._get_backend(of_all._device_types[-1]).options._timeout
    for group in distributed_c10d._world.pg_map:
        if group is not of_all and not distributed_c10d._rank_not_in_group(group):
            distributed_c10d._set_pg_timeout(limit, group)


def use_expandable_segments() -> None:
    """Let CUDA's allocator grow its blocks, unless the user has configured it; call it before CUDA starts.

    The rows that a rank receives are another number in every layer and step, which leaves holes in blocks of fixed
    sizes.
    """
    if not ALLOCATOR.isdisjoint(os.environ):
        return
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def _unlink_shared_memory() -> None:
    """Let the shared memory of DeepSpeed's CPU ranks (66 MiB each, shm.cpp) end with their processes.

    DeepSpeed 0.19 never removes its files from /dev/shm, so the memory of every finished process would stay in use.
    """
    dist.barrier()  # after it, every rank has opened the files of all others, and may remove its own
    place = (str(os.getuid()), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], str(dist.get_rank()))
    Path("/dev/shm", "_".join(("deepspeed_allreduce_buffer", *place))).unlink(missing_ok=True)
