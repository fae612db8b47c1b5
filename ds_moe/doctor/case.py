"""The doctor's checks: `run` needs the run file alone, `model` the model's config and headers, `data` the records.

Every check takes the `Case` and gives `Finding`s; none trains, downloads or reads a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ds_moe.config.run import RunConfig
from ds_moe.config.zero_plan import ZeroPlan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report; `details` are lines below it."""

    level: Literal["ok", "warning", "error"]
    text: str
    details: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Device:
    """What a rank computes on: `memory` bytes of one rank, and in words where that number comes from."""

    on_cpu: bool
    memory: float
    source: str


@dataclass
class Case:
    """A run under examination. What an earlier check could not establish is None."""

    config: RunConfig
    world_size: int
    device: Device
    samples: int  # records of each data file to decode and tokenize
    folder: str | None = None  # of the checkpoint on this machine
    model: PretrainedConfig | None = None
    zero: ZeroPlan | None = None  # of the DeepSpeed JSON
    tokens_a_sample: float | None = None  # mean over the training records looked at
    records: int | None = None  # good training records

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run, as far as known."""
        train = self.config.train
        if train.steps is not None or self.records is None or train.epochs is None:
            return train.steps
        return train.epochs * -(-self.records // train.global_batch_size)
