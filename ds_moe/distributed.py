"""Where a process stands in its job, and helpers for what its ranks must do alike.

What is called collective must be called by every rank, in the same order.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from ds_moe.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Topology:
    """Where this process stands.

    `ep_size` consecutive ranks share one copy of the experts, `sequence_parallel` consecutive ranks each packed row.
    """

    rank: int  # of all processes of the job
    world_size: int
    local_rank: int  # of the processes of this host
    ep_size: int
    device: torch.device
    sequence_parallel: int = 1

    @property
    def ep_rank(self) -> int:
        """The rank among those that share a copy of the experts."""
        return self.rank % self.ep_size

    @property
    def data_ranks(self) -> int:
        """How many rows are trained at the same time: ranks that share one count once."""
        return self.world_size // self.sequence_parallel

    @property
    def data_rank(self) -> int:
        """Which of these rows this rank takes, or shares."""
        return self.rank // self.sequence_parallel

    @property
    def part(self) -> int:
        """Which part of the row is this rank's."""
        return self.rank % self.sequence_parallel


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share each packed row."""

    size: int
    rank: int  # this process's among them, which is the part of a row that it takes
    group: dist.ProcessGroup


def sequence_group(topology: Topology) -> SequenceGroup | None:
    """The ranks that share rows with this one; None: it takes whole rows (collective, the first time)."""
    if topology.sequence_parallel == 1:
        return None
    group = _consecutive(topology.sequence_parallel, topology.world_size)
    return SequenceGroup(topology.sequence_parallel, topology.part, group)


@cache
def _consecutive(size: int, world_size: int) -> dist.ProcessGroup:
    """The group of this process, where every `size` consecutive ranks form one."""
    groups = [dist.new_group(list(range(start, start + size))) for start in range(0, world_size, size)]
    return cast(dist.ProcessGroup, groups[dist.get_rank() // size])  # else: a number, to ranks outside of a group


def ranks_of_host() -> int | None:
    """How many ranks the launcher has started on this host; None where a process was started by hand."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # of torchrun; of DeepSpeed's launcher
    return int(ranks) if ranks else None


def parallel() -> bool:
    """Whether torch.distributed has started with more than one rank."""
    return dist.is_initialized() and dist.get_world_size() > 1


def over_ranks(value: T) -> list[T]:
    """The values of all ranks, by rank, on every rank (collective). They are pickled, so keep them small.

    A process in which torch.distributed has not started gets its own value alone.
    """
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return cast(list[T], values)


def raise_together(error: str | None) -> None:
    """Raise `UserError` on every rank, with the messages of all, each once, if any rank has an error (collective)."""
    errors = dict.fromkeys(found for found in over_ranks(error) if found)
    if errors:
        raise UserError("; ".join(errors))


def together(topology: Topology, what: str, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return the results of all, by rank (collective).

    Args:
        what: completes "rank 0 could not ..." in the message.

    Raises:
        UserError: on every rank if `action` raised on any, so that no rank waits for one that has given up.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:  # of any kind, because the other ranks are waiting for this one
        failure = f"rank {topology.rank} could not {what}: {type(error).__name__}: {error}"
    raise_together(failure)
    return over_ranks(cast(T, result))
