"""`RunConfig`, the root of a run file."""

from __future__ import annotations

from typing import Literal

from ds_moe.config.moe import MoEConfig
from ds_moe.config.sections import (
    CheckpointConfig,
    DataConfig,
    Located,
    LoRAConfig,
    ModelConfig,
    MonitorConfig,
    TrainConfig,
)
from ds_moe.config.tasks import GateConfig, RLConfig


class RunConfig(Located):
    """One run, as `ds_moe.train` takes it."""

    task: Literal["sft", "rl", "gate"] = "sft"  # imitate answers, reinforce the completions of rollouts, gate adapters
    model: ModelConfig
    data: DataConfig
    moe: MoEConfig | None = None  # absent for a dense model
    lora: LoRAConfig | None = None  # absent: the model itself is trained
    train: TrainConfig = TrainConfig()
    rl: RLConfig = RLConfig()
    gate: GateConfig = GateConfig()
    monitor: MonitorConfig = MonitorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    deepspeed: str  # a DeepSpeed JSON, beside the run file or below the working directory


def other_task(config: RunConfig, name: str) -> str | None:
    """The task of a run where it is another one than `name`, which a command is for."""
    return None if config.task == name else config.task
