"""What types cannot say about a run file: contradictions, and keys that this run would not use.

The rules stand in `rules/` and are put together here. `problems` and `model_problems` list all complaints, each one
line that names the place, the key and the fix; `check_model` raises the first.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from ds_moe.config.rules import (
    data,
    dpo,
    engine,
    gate,
    lora,
    model,
    moe,
    reward,
    rl,
    sequence_parallel,
    streaming,
    train,
)
from ds_moe.config.rules.rule import Complaint, Unused, written
from ds_moe.config.run import RunConfig, task_is
from ds_moe.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SECTIONS = (rl, engine, reward, lora, gate, dpo, moe, train, data)
UNUSED: dict[str, Unused] = {key: rule for section in SECTIONS for key, rule in section.UNUSED.items()}
CONTRADICTIONS = [  # in the order of the complaints: users see the first
    train.alternatives,
    *(section.contradictions for section in (moe, rl, engine, reward, lora, gate, dpo, train, data)),
    *(section.contradictions for section in (streaming, sequence_parallel)),
]


def check_model(config: RunConfig, model_config: PretrainedConfig, world_size: int | None = None) -> None:
    """Raise `UserError` for the first key that does not fit this model (a transformers config, read before loading)."""
    if found := model_problems(config, model_config, world_size):
        raise UserError(found[0])


def attention_problem(config: RunConfig, on_cpu: bool) -> str | None:
    """As `lacking_kernels`, with the place in the run file."""
    problem = lacking_kernels(config.model.attention, on_cpu)
    return None if problem is None else f"{config.at('model.attention')}: {problem}"


def lacking_kernels(attention: str, on_cpu: bool) -> str | None:
    """Why `model.attention` has no kernels on this machine; None: it has.

    Without flash_attn transformers would look for kernels on the hub, which is code that nobody has read.
    """
    if attention != "flash_attention_2":
        return None
    text = "model.attention flash_attention_2"
    if on_cpu:
        return f"{text} needs an accelerator; use sdpa"
    if find_spec("flash_attn") is None:
        return f"{text}: flash_attn is not installed in this environment; install it, or use sdpa"
    return None


def check_evaluation(config: RunConfig) -> None:
    """Raise `UserError` for a run that `ds-moe eval` has nothing to do with."""
    if task_is(config, "gate"):
        raise UserError(f"{config.at('task')}: task is gate; ds-moe gate eval is about runs of this task")
    if config.data.eval is None:
        fix = 'data.eval=FILE, or "digits"'
        raise UserError(f"{config.at('data')}: data.eval is not set: there is nothing to evaluate on ({fix})")


def problems(config: RunConfig) -> list[str]:
    """Every contradiction and unused key of a run file."""
    lines = [_located(config, complaint) for rule in CONTRADICTIONS for complaint in rule(config)]
    for key, reason in unused_keys(config).items():
        if written(config, key):
            lines.append(f"{config.at(key)}: {key} would not be used: {reason}; remove it")
    return lines


def model_problems(config: RunConfig, model_config: PretrainedConfig, world_size: int | None = None) -> list[str]:
    """Every key of a run file that contradicts the model: MoE or dense, number of experts, vision or text only."""
    return [_located(config, complaint) for complaint in model.contradictions(config, model_config, world_size)]


def warmup_problem(config: RunConfig, total_steps: int) -> str | None:
    """The complaint about a warm-up that does not end within `total_steps`, which under train.epochs the data tell."""
    complaint = train.warmup(config, total_steps)
    return _located(config, complaint) if complaint else None


def unused_keys(config: RunConfig) -> dict[str, str]:
    """Dotted keys that this run would not use, written or not, each with the reason."""
    reasons = {key: rule(config) for key, rule in UNUSED.items()}
    return {key: reason for key, reason in reasons.items() if reason}


def _located(config: RunConfig, complaint: Complaint) -> str:
    key, text = complaint
    return f"{config.at(key)}: {text}"
