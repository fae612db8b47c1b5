"""Which parameters a run does not train, and how many it does."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from ds_moe.config.run import RunConfig
from ds_moe.errors import UserError

FREEZE_PATTERNS = {
    "vision": r"^model\.visual\.",
    "router": r"\.mlp\.gate\.",
    "experts": r"\.mlp\.experts\.",
    "embeddings": r"embed_tokens\.|^lm_head\.",
}


STAGE_FREEZES = {"all": [], "router_only": [r"^(?!.*\.mlp\.gate\.)"]}  # by train.stage; a router's noise is trained too


def frozen(config: RunConfig) -> list[str]:
    """What a run does not train, as patterns for `freeze`."""
    return [*config.model.freeze, *STAGE_FREEZES[config.train.stage]]


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Stop training the parameters that a pattern names ("vision", "router", "experts", "embeddings" or a regex).

    Raises:
        UserError: a pattern that matches nothing, or nothing left to train.
    """
    for pattern in patterns:
        expression = re.compile(FREEZE_PATTERNS.get(pattern, pattern))
        matched = [parameter for name, parameter in model.named_parameters() if expression.search(name)]
        if not matched:
            raise UserError(f"model.freeze pattern {pattern!r} matches no parameter of this model")
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"model.freeze {patterns} leaves nothing to train")
    if isinstance(model, PreTrainedModel) and not _embeds_with_grad(model):
        model.enable_input_require_grads()


def _embeds_with_grad(model: PreTrainedModel) -> bool:
    """Whether hidden states carry a gradient from the first layer on.

    Where they do not, ZeRO-3 takes a trained router of that layer away before its gradient has arrived: DeepSpeed's
    hook for the end of a module's backward fires at its beginning when no input of the module needs a gradient.
    """
    return any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters())


def parameter_table(model: nn.Module, parts: dict[str, str] | None = None) -> list[tuple[str, int, int]]:
    """(part, trainable, all) parameter counts on this rank, in the order of `FREEZE_PATTERNS`, then the rest."""
    compiled = {part: re.compile(pattern) for part, pattern in (parts or FREEZE_PATTERNS).items()}
    totals = {part: [0, 0] for part in [*compiled, "rest"]}
    for name, parameter in model.named_parameters():
        part = next((part for part, pattern in compiled.items() if pattern.search(name)), "rest")
        size = getattr(parameter, "ds_numel", parameter.numel())
        totals[part][0] += size if parameter.requires_grad else 0
        totals[part][1] += size
    return [(part, trained, total) for part, (trained, total) in totals.items() if total]
