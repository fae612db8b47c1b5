"""Where a process stands in its job, and collective helpers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe.errors import UserError


@dataclass(frozen=True)
class Topology:
    """Where this process stands. `ep_size` consecutive ranks share one copy of the experts."""

    rank: int
    world_size: int
    local_rank: int
    ep_size: int
    device: torch.device

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep_size


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    if device.type == "cuda":  # from pinned memory the copies run beside the computation
        batch = {key: value.pin_memory() for key, value in batch.items()}
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def raise_together(error: str | None) -> None:
    """Raise `UserError` on every rank if any has an error (collective)."""
    errors = [found for found in over_ranks(error) if found]
    if errors:
        raise UserError("; ".join(errors))


def over_ranks(value: Any) -> list[Any]:
    """The value of every rank, on every rank (collective where there are several)."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(topology: Topology, what: str, action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank and share results; if it failed anywhere, every rank raises and none waits in vain."""
    try:
        outcome = (True, action())
    except Exception as error:  # whatever it is, the others wait for this rank
        outcome = (False, f"rank {topology.rank} could not {what}: {type(error).__name__}: {error}")
    outcomes: list[Any] = [None] * topology.world_size
    dist.all_gather_object(outcomes, outcome)
    failures = [message for ok, message in outcomes if not ok]
    if failures:
        raise UserError("; ".join(failures))
    return [result for _, result in outcomes]


def parallel() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
