"""The run under examination, and the form of what the doctor says about it.

Every check takes the `Case` and yields `Finding`s; none trains, downloads or reads a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ds_moe.config.run import RunConfig
from ds_moe.config.zero_plan import ZeroPlan

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ds_moe.data.position import DataPosition
    from ds_moe.data.processor import Processor
    from ds_moe.data.record_kind import Records
    from ds_moe.weights.files import SafetensorsFiles

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report; `details` are lines below it."""

    level: Literal["ok", "warning", "error"]
    text: str
    details: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Device:
    """What a rank computes on: `memory` is in bytes and belongs to one rank, `source` says where the number is from."""

    on_cpu: bool
    memory: float
    source: str


@dataclass
class Case:
    """A run under examination. Checks fill it in; what none has established yet, or could not, is None."""

    config: RunConfig
    world_size: int
    device: Device
    samples: int  # records of each data file that are decoded and tokenized
    folder: str | None = None  # where the model's files are on this machine
    model: PretrainedConfig | None = None
    files: SafetensorsFiles | None = None  # of the folder, all of them there
    experts: int | None = None  # of each MoE block of the model
    outline: PreTrainedModel | None = None  # the model without storage, with its frozen parts marked
    checkpoint: Path | None = None  # that the run would go on from
    order: DataPosition | None = None  # what the order of its data depends on
    zero: ZeroPlan | None = None  # of the DeepSpeed JSON
    tokens_a_sample: float | None = None  # mean over the training records that were decoded
    records: int | None = None  # good training records
    train: Records | None = None  # these records
    processor: Processor | None = None  # of the model

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run; None where they follow from the number of records, which is not known."""
        train = self.config.train
        if train.steps is not None or self.records is None or train.epochs is None:
            return train.steps
        return train.epochs * -(-self.records // train.global_batch_size)
