"""`RunConfig`, the root of a run file."""

from typing import Literal

from pydantic import field_validator
from pydantic_core import PydanticCustomError

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
from ds_moe.config.tasks import DPOConfig, GateConfig, RLConfig, TaskSection


class RunConfig(Located):
    """A run file: everything that `ds_moe.train` must be told about a run."""

    # Imitate answers, reinforce the completions of rollouts, gate adapters, prefer one of two answers.
    task: Literal["sft", "rl", "gate", "dpo"] = "sft"
    model: ModelConfig
    data: DataConfig
    moe: MoEConfig | None = None  # absent for a dense model
    lora: LoRAConfig | None = None  # absent: the model itself is trained
    train: TrainConfig = TrainConfig()
    rl: RLConfig = RLConfig()
    gate: GateConfig = GateConfig()
    dpo: DPOConfig = DPOConfig()
    monitor: MonitorConfig = MonitorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    # A DeepSpeed JSON: the name of a shipped one, such as zero3, the path of another, beside the run file or below the
    # working directory, or its keys.
    deepspeed: str | dict[str, object]

    @property
    def tokens_per_row(self) -> int:
        """Tokens that a packed row, the micro-batch of one rank, holds at most."""
        return self.train.tokens_per_micro_batch or self.data.max_length

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _name_path_or_keys(cls, value: object) -> object:
        if not isinstance(value, str | dict):
            keys = "a section with the keys of a DeepSpeed JSON"
            raise PydanticCustomError("deepspeed", f"Input should be a valid string or {keys}")
        return value


def task_is(config: RunConfig, name: str) -> bool:
    """Whether a rule or command about the task `name` concerns this run."""
    return config.task == name


def task_section(config: RunConfig) -> TaskSection:
    """The section of the run's task; one without keys for `sft`."""
    return getattr(config, config.task, TaskSection())


def other_task(config: RunConfig, name: str) -> str | None:
    """The task of a run where it is another one than `name`, which a rule or command is for; None: it is that one."""
    return None if task_is(config, name) else config.task
