"""One run: everything the loop works with, and how it is set up."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import deepspeed
from torch import Tensor

from ds_moe.checkpoint import save as checkpoint
from ds_moe.checkpoint.base import fingerprint
from ds_moe.config.run import RunConfig
from ds_moe.data.stream import EvalSet, TrainStream
from ds_moe.distributed import Topology
from ds_moe.faults.signals import StopRequest
from ds_moe.faults.watchdog import Watchdog
from ds_moe.memory.predict import Memory
from ds_moe.models.convert import moe_layers
from ds_moe.moe import ForwardContext, MoELayer
from ds_moe.moe.loss_free import LossFreeBalancing, loss_free
from ds_moe.monitor import Monitor, StepReport
from ds_moe.tasks.registry import keeps_base_apart
from ds_moe.tasks.task import Supervised
from ds_moe.training.early_stopping import EarlyStopping


@dataclass
class Run:
    """Everything the loop works with."""

    config: RunConfig
    topology: Topology
    engine: deepspeed.DeepSpeedEngine
    context: ForwardContext | None  # None for a dense model
    processor: Any
    stream: TrainStream
    eval_set: EvalSet | None
    monitor: Monitor
    total_steps: int
    memory: Memory  # predicted, of one rank
    watch: Watchdog
    stop: StopRequest
    task: Supervised = field(default_factory=Supervised)
    patience: EarlyStopping | None = None
    step: int = 0
    evaluation_due: bool = False  # after the last step
    saving: checkpoint.Saving | None = None  # in flight
    all_written: bool = False  # whether the files of `saving` were there on all ranks at the last step
    stopping: signal.Signals | None = None  # what all ranks have agreed to end by
    skipped: int = 0  # steps not taken, in all
    skipped_in_a_row: int = 0
    file_from: int = 0  # the step at which the data file was begun: rollout files follow one another
    seconds: float = 0.0  # of training steps in this process
    tokens: int = 0
    task_sums: dict[str, float] = field(default_factory=dict)  # of `StepReport.task`, over the steps in this process
    task_steps: int = 0
    load_before_step: list[Tensor | int] = field(default_factory=list)  # see expert_load.py
    result: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def layers(self) -> list[MoELayer]:
        """Empty for a dense model."""
        return moe_layers(self.engine.module)

    @cached_property
    def balancings(self) -> list[LossFreeBalancing]:
        """Of the layers, where a bias takes part in the selection."""
        return loss_free(self.engine.module)

    @cached_property
    def base(self) -> dict[str, Any] | None:
        """What checkpoints leave out, see `checkpoint.Saving`."""
        return fingerprint(self.config) if keeps_base_apart(self.config) else None

    @property
    def last(self) -> bool:
        """Whether the last step is done."""
        return self.step == self.total_steps

    @property
    def folder(self) -> Path:
        return Path(self.config.train.output_dir)

    def note_progress(self, report: StepReport) -> None:
        self.seconds += report.step_s
        self.tokens += report.tokens
        self.result |= {"step": report.step, "loss": report.loss, "tokens_per_s": self.tokens / self.seconds}
        if report.task:
            self.task_sums = {name: self.task_sums.get(name, 0.0) + value for name, value in report.task.items()}
            self.task_steps += 1
            self.result[self.config.task] = {name: total / self.task_steps for name, total in self.task_sums.items()}


SKIPPED_STEPS = "skipped_steps.jsonl"  # in the output folder: steps that were not taken, with their samples
