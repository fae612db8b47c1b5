"""Everything the loop works with."""

import math
import signal
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import deepspeed
from torch import Tensor

from ds_moe.checkpoint.progress import Figures, Progress
from ds_moe.checkpoint.save import Saving
from ds_moe.config.run import RunConfig
from ds_moe.faults.signals import StopRequest
from ds_moe.faults.watchdog import Watchdog
from ds_moe.memory.predict import Memory
from ds_moe.models.stored_names import Carried
from ds_moe.monitor.monitor import Monitor
from ds_moe.monitor.reports import StepReport
from ds_moe.tasks.registry import TaskKind, task_kind
from ds_moe.tasks.task import Task, TrainingParts

SKIPPED_STEPS = "skipped_steps.jsonl"  # in the output folder: steps that were not taken, with their samples


@dataclass
class Session:
    """What this process counts; a resumed run begins anew."""

    seconds: float = 0.0  # of training steps
    tokens: int = 0
    task_sums: dict[str, float] = field(default_factory=dict)  # of `StepReport.task`, over steps
    task_steps: int = 0
    skipped: int = 0  # steps not taken, in all
    skipped_in_a_row: int = 0

    def note(self, report: StepReport) -> None:
        """Add a step."""
        self.seconds += report.step_s
        self.tokens += report.tokens
        self.skipped += not report.taken
        self.skipped_in_a_row = 0 if report.taken else self.skipped_in_a_row + 1
        if report.task:
            self.task_sums = {name: self.task_sums.get(name, 0.0) + value for name, value in report.task.items()}
            self.task_steps += 1

    @property
    def task_means(self) -> dict[str, float]:
        return {name: total / self.task_steps for name, total in self.task_sums.items()}


@dataclass
class EarlyStopping:
    """`train.patience`: ends a run when its held-out loss no longer falls; its newest checkpoint is the best one."""

    patience: int  # evaluations without a better loss
    best: float = math.inf
    waited: int = 0
    figures: Figures = field(default_factory=Figures)  # of the run, at its best evaluation

    def note(self, loss: float, figures: Figures) -> bool:
        """Whether this evaluation is the best so far."""
        better = loss < self.best
        if better:
            self.best, self.waited, self.figures = loss, 0, replace(figures)
        else:
            self.waited += 1
        return better

    def go_on(self, best: float, figures: Figures, waited: int) -> None:
        """As it was when a checkpoint was taken."""
        self.best, self.figures, self.waited = best, replace(figures), waited

    @property
    def exhausted(self) -> bool:
        return self.waited >= self.patience


@dataclass
class Run:
    """Everything the loop works with. `parts` and `progress` are what tasks see of it."""

    parts: TrainingParts
    task: Task
    progress: Progress
    monitor: Monitor
    memory: Memory  # predicted, of one rank
    carried: Carried  # goes from the model's files into checkpoints; nothing where these leave the base out
    watch: Watchdog
    stop: StopRequest
    patience: EarlyStopping | None = None
    session: Session = field(default_factory=Session)
    saving: Saving | None = None  # the checkpoint whose files are being written
    all_written: bool = False  # whether the files of `saving` were there on all ranks at the last step
    stopping: signal.Signals | None = None  # what all ranks have agreed to end by
    load_before_step: list[Tensor | int] = field(default_factory=list)  # see expert_load.py

    @property
    def config(self) -> RunConfig:
        return self.parts.config

    @property
    def engine(self) -> deepspeed.DeepSpeedEngine:
        return self.parts.engine

    @cached_property
    def kind(self) -> TaskKind:
        return task_kind(self.config)

    @cached_property
    def base(self) -> dict[str, object] | None:
        """What checkpoints leave out, see `checkpoint.save.Saving`."""
        return self.kind.base(self.config)

    @property
    def folder(self) -> Path:
        return Path(self.config.train.output_dir)

    def note_progress(self, report: StepReport) -> None:
        """Take a step's report into the sums of this process and the figures of the run."""
        self.session.note(report)
        figures = self.progress.figures
        figures.step, figures.loss = report.step, report.loss
        figures.tokens_per_s = self.session.tokens / self.session.seconds
        if report.task:
            figures.task = self.session.task_means
