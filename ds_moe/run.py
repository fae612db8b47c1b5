"""One run: everything the loop works with, and how it is set up."""

from __future__ import annotations

import random
import signal
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor

from ds_moe import checkpoint
from ds_moe.checks import check_model, warmup_problem
from ds_moe.config import RunConfig
from ds_moe.data.forms import eval_form, train_form
from ds_moe.data.stream import EvalSet, TrainStream
from ds_moe.ds_config import precision, resolve_deepspeed
from ds_moe.early_stopping import EarlyStopping
from ds_moe.engine import Topology, build_engine, on_cpu, prepare_model, read_weights, start_distributed
from ds_moe.errors import UserError
from ds_moe.evaluate import raise_together
from ds_moe.expert_load import watch as count_load
from ds_moe.gating.stages import GateTask
from ds_moe.memory import Memory, predict, skeleton
from ds_moe.models.convert import moe_layers
from ds_moe.models.processor import processor_of
from ds_moe.models.qwen3_vl import load_model, model_config
from ds_moe.moe import ForwardContext, MoELayer
from ds_moe.moe.loss_free import LossFreeBalancing, loss_free
from ds_moe.monitor import Monitor, StepReport, make_monitor
from ds_moe.rl import PolicyOptimization
from ds_moe.stopping import StopRequest
from ds_moe.summary import active_flops_per_token, peak_flops
from ds_moe.task import Supervised
from ds_moe.trainable import fingerprint, keeps_base_apart, set_trainable
from ds_moe.watchdog import Watchdog, watch_job


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


def set_up(config: RunConfig) -> Run:
    """Data, model, engine and monitor, in the order in which mistakes are cheapest to find."""
    topology = start_distributed(config.moe.ep_size if config.moe else 1)
    watch = watch_job(topology.rank, topology.world_size, config.train.watchdog_s)
    stop = StopRequest(topology.rank, config.train.stop_within_s, lambda: str(watch.place))
    raise_together(_unwritable(Path(config.train.output_dir)))
    seed_everything(config.train.seed)
    dtype = torch.bfloat16 if precision(config, on_cpu()) == "bf16" else torch.float32
    processor = processor_of(config.model)
    ranks = {"rank": topology.rank, "world_size": topology.world_size, "raise_errors": False}
    stream = TrainStream(config, processor, **ranks, form=train_form(config, model_config(config.model)))
    eval_set = None
    if config.data.eval is not None:
        eval_set = EvalSet(config, processor, **ranks, form=eval_form(config))
    total_steps = config.train.steps or (config.train.epochs or 1) * stream.steps_per_epoch
    follows = config.task == "rl" and config.train.epochs is not None  # other rollout files, whose steps are not known
    if not follows and (problem := warmup_problem(config, total_steps)):
        raise UserError(problem)
    outline = skeleton(model_config(config.model))
    check_model(config, outline.config)
    hidden_size = outline.config.get_text_config().hidden_size
    ds_config = resolve_deepspeed(config, topology.world_size, on_cpu(), hidden_size)
    set_trainable(outline, config)
    memory = predict(outline, config, ds_config, topology.world_size, on_cpu())
    model = load_model(config.model, dtype, config.train.seed, unread=config.task != "gate")
    context = prepare_model(model, config, topology)
    read_weights(model, config, topology, ds_config)
    engine = build_engine(model, config, ds_config, total_steps)
    engine.train()
    seed_everything(config.train.seed + topology.rank)  # from here on ranks draw apart
    monitor = make_monitor(
        config,
        rank=topology.rank,
        total_steps=total_steps,
        flops_per_token=active_flops_per_token(outline),
        peak_flops=peak_flops(topology),
        run_dir=Path(config.train.output_dir),
    )
    if config.monitor.tensorboard:
        count_load(moe_layers(engine.module), len(stream.kinds))
    return Run(
        config=config,
        topology=topology,
        engine=engine,
        context=context,
        processor=processor,
        stream=stream,
        eval_set=eval_set,
        monitor=monitor,
        total_steps=total_steps,
        memory=memory,
        watch=watch,
        stop=stop,
        task=_task(config, engine.module, stream),
        patience=EarlyStopping(config.train.patience) if config.train.patience else None,
    )


def _task(config: RunConfig, model: Any, stream: TrainStream) -> Supervised:
    if config.task == "rl":
        return PolicyOptimization(config.rl, config.moe is not None and config.moe.replay.enabled, model)
    if config.task == "gate":
        return GateTask(config.gate, model, stream.kept)
    return Supervised()


def _unwritable(folder: Path) -> str | None:
    """Why a run could not write below its output folder, before anything is loaded for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"train.output_dir {folder} cannot be written ({error.strerror}); choose another"


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
