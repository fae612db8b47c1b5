"""Rules of a run file that types cannot say: contradictions, and keys that this run would not use.

Each rule is a line of a table. `check_used` and `check_model` raise the first complaint as a `UserError`; `problems`
and `model_problems` list them all, each one line that names the place, the key and the fix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ds_moe.config.rules.gate import GATE_CONTRADICTIONS, GATE_UNUSED
from ds_moe.config.rules.lora import LORA_CONTRADICTIONS, LORA_UNUSED
from ds_moe.config.rules.model import MODEL_RULES
from ds_moe.config.rules.moe import (
    _balance,
    _balance_effect,
    _causal,
    _dispatch,
    _no_chunks,
    _no_drop,
    _no_normalize,
    _no_order,
    _no_recompute,
    _router_groups,
)
from ds_moe.config.rules.rl import RL_CONTRADICTIONS, RL_UNUSED
from ds_moe.config.rules.rule import Complaint, written
from ds_moe.config.rules.train import (
    _flash_attention,
    _no_answers,
    _no_eval,
    _no_files,
    _no_generation,
    _no_periodic_eval,
    _no_samples,
    _no_tensorboard,
    _one_of,
    _patience,
    _stage,
    _warmup,
)
from ds_moe.config.run import RunConfig
from ds_moe.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_used(config: RunConfig) -> None:
    """Raise `UserError` for the first contradiction or unused key of a run, as far as the run file alone tells."""
    _raise_first(problems(config))


def check_model(config: RunConfig, model_config: PretrainedConfig) -> None:
    """Raise `UserError` for the first key that does not fit this model (a transformers config, read before loading)."""
    _raise_first(model_problems(config, model_config))


def problems(config: RunConfig) -> list[str]:
    """Every contradiction and unused key of a run file."""
    contradictions = [(key, text) for rule in CONTRADICTIONS for key, text in [rule(config)] if text]
    lines = [f"{config.at(key)}: {text}" for key, text in contradictions]
    for key, reason in unused_keys(config).items():
        if written(config, key):
            lines.append(f"{config.at(key)}: {key} would not be used: {reason}; remove it")
    return lines


def model_problems(config: RunConfig, model_config: PretrainedConfig) -> list[str]:
    """Every key of a run file that contradicts the model: MoE or dense, number of experts, vision or text only."""
    return [f"{config.at(key)}: {text}" for rule in MODEL_RULES for key, text in rule(config, model_config)]


def warmup_problem(config: RunConfig, total_steps: int) -> str | None:
    """The complaint about a warm-up that does not end within `total_steps`, which under train.epochs the data tell."""
    key, text = _warmup(config, total_steps)
    return None if text is None else f"{config.at(key)}: {text}"


def unused_keys(config: RunConfig) -> dict[str, str]:
    """Dotted keys that this run would not use, written or not, each with the reason."""
    reasons = {key: rule(config) for key, rule in UNUSED.items()}
    return {key: reason for key, reason in reasons.items() if reason}


def used_keys(config: RunConfig) -> dict[str, Any]:
    """The tree as plain data without the keys that this run would not use and without keys that are not set."""
    unused = unused_keys(config)

    def prune(value: Any, key: str) -> Any:
        if not isinstance(value, dict):
            return value
        children = {name: (f"{key}.{name}" if key else name, child) for name, child in value.items()}
        return {n: prune(child, k) for n, (k, child) in children.items() if k not in unused and child is not None}

    return prune(config.model_dump(mode="json"), "")


def _raise_first(lines: list[str]) -> None:
    if lines:
        raise UserError(lines[0])


# --- keys without effect: dotted key -> why this run would not use it, or None where it would


UNUSED: dict[str, Callable[[RunConfig], str | None]] = {
    **RL_UNUSED,
    **LORA_UNUSED,
    **GATE_UNUSED,
    "moe.router.order": _no_order,
    "moe.router.normalize": _no_normalize,
    "moe.router.drop": _no_drop,
    "moe.dispatch.chunks": _no_chunks,
    "moe.experts.recompute": _no_recompute,
    "data.root": _no_files,
    "data.length_grouping": lambda c: None if c.train.global_batch_size > 1 else "train.global_batch_size is 1",
    "data.prefetch_factor": lambda c: None if c.data.num_workers else "data.num_workers is 0",
    "train.min_lr_ratio": lambda c: None if c.train.schedule == "cosine" else f"train.schedule is {c.train.schedule}",
    "train.eval_every": _no_eval,
    "train.eval_batch_size": _no_eval,
    "train.eval_samples": _no_periodic_eval,
    "train.eval_generate": _no_answers,
    "train.max_new_tokens": _no_generation,
    "monitor.dead_alarm_steps": lambda c: None if c.moe else "there is no moe section",
    "monitor.heatmap_every": lambda c: _no_tensorboard(c) or (None if c.moe else "there is no moe section"),
    "monitor.sample_images": _no_samples,
}


# --- contradictions: each gives (key, complaint), the complaint None where all is well


CONTRADICTIONS: list[Callable[[RunConfig], Complaint]] = [
    _one_of("model.path", "model.preset"),
    _one_of("train.steps", "train.epochs"),
    _dispatch,
    _balance,
    _balance_effect,
    _causal,
    _router_groups,
    _stage,
    *RL_CONTRADICTIONS,
    *LORA_CONTRADICTIONS,
    *GATE_CONTRADICTIONS,
    _patience,
    lambda config: _warmup(config, config.train.steps),
    _flash_attention,
]


# --- the run against its model: each gives any number of (key, complaint)
