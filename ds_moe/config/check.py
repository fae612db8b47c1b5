"""What types cannot say about a run file: contradictions, and keys that this run would not use.

The rules stand in `rules/`, in tables that are put together here. `check_used` and `check_model` raise the first
complaint as a `UserError`; `problems` and `model_problems` list them all, each one line that names the place, the key
and the fix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_moe.config.rules import gate, lora, model, moe, rl, train
from ds_moe.config.rules.rule import Complaint, Contradiction, Unused, written
from ds_moe.config.run import RunConfig
from ds_moe.config.yaml_lines import Plain, join
from ds_moe.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

UNUSED: dict[str, Unused] = {**rl.UNUSED, **lora.UNUSED, **gate.UNUSED, **moe.UNUSED, **train.UNUSED}
CONTRADICTIONS: list[Contradiction] = [  # in the order of the complaints: users see the first
    *train.ALTERNATIVES,
    *moe.CONTRADICTIONS,
    *rl.CONTRADICTIONS,
    *lora.CONTRADICTIONS,
    *gate.CONTRADICTIONS,
    *train.CONTRADICTIONS,
]


def check_used(config: RunConfig) -> None:
    """Raise `UserError` for the first contradiction or unused key of a run, as far as the run file alone tells."""
    _raise_first(problems(config))


def check_model(config: RunConfig, model_config: PretrainedConfig) -> None:
    """Raise `UserError` for the first key that does not fit this model (a transformers config, read before loading)."""
    _raise_first(model_problems(config, model_config))


def problems(config: RunConfig) -> list[str]:
    """Every contradiction and unused key of a run file."""
    lines = [_located(config, complaint) for rule in CONTRADICTIONS if (complaint := rule(config))]
    for key, reason in unused_keys(config).items():
        if written(config, key):
            lines.append(f"{config.at(key)}: {key} would not be used: {reason}; remove it")
    return lines


def model_problems(config: RunConfig, model_config: PretrainedConfig) -> list[str]:
    """Every key of a run file that contradicts the model: MoE or dense, number of experts, vision or text only."""
    return [_located(config, one) for rule in model.CONTRADICTIONS for one in rule(config, model_config)]


def warmup_problem(config: RunConfig, total_steps: int) -> str | None:
    """The complaint about a warm-up that does not end within `total_steps`, which under train.epochs the data tell."""
    complaint = train.warmup(config, total_steps)
    return _located(config, complaint) if complaint else None


def unused_keys(config: RunConfig) -> dict[str, str]:
    """Dotted keys that this run would not use, written or not, each with the reason."""
    reasons = {key: rule(config) for key, rule in UNUSED.items()}
    return {key: reason for key, reason in reasons.items() if reason}


def used_keys(config: RunConfig) -> dict[str, Plain]:
    """The tree as plain data without the keys that this run would not use and without keys that are not set."""
    unused = unused_keys(config)

    def prune(section: dict[str, Plain], key: str) -> dict[str, Plain]:
        kept = {}
        for name, value in section.items():
            dotted = join(key, name)
            if dotted not in unused and value is not None:
                kept[name] = prune(value, dotted) if isinstance(value, dict) else value
        return kept

    return prune(config.model_dump(mode="json"), "")


def _located(config: RunConfig, complaint: Complaint) -> str:
    key, text = complaint
    return f"{config.at(key)}: {text}"


def _raise_first(lines: list[str]) -> None:
    if lines:
        raise UserError(lines[0])
