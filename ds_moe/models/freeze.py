"""Which parameters a run does not train, and how many it does."""

import re

from torch import nn
from transformers import PreTrainedModel

from ds_moe.config.run import RunConfig
from ds_moe.errors import UserError
from ds_moe.models.families import Family, family_of


def frozen(config: RunConfig, family: Family) -> list[str]:
    """What a run does not train, as patterns for `freeze`."""
    if config.train.stage == "router_only":
        return [*config.model.freeze, rf"^(?!.*{family.parts['router']})"]
    return list(config.model.freeze)


def freeze(model: PreTrainedModel, patterns: list[str]) -> None:
    """Stop training the parameters that a pattern names: a part of `Family.parts`, or a regex.

    Raises:
        UserError: a pattern that matches nothing, or nothing left to train.
    """
    parts = family_of(model).parts
    for pattern in patterns:
        expression = re.compile(parts.get(pattern, pattern))
        matched = [parameter for name, parameter in model.named_parameters() if expression.search(name)]
        if not matched:
            raise UserError(f"model.freeze pattern {pattern!r} matches no parameter of this model")
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"model.freeze {patterns} leaves nothing to train")
    if not _embeds_with_grad(model):
        model.enable_input_require_grads()


def _embeds_with_grad(model: PreTrainedModel) -> bool:
    """Whether hidden states carry a gradient from the first layer on.

    Where they do not, ZeRO-3 partitions a trained router of that layer again before its gradient has arrived:
    DeepSpeed's hook for the end of a module's backward fires at its beginning when no input of the module needs a
    gradient.
    """
    return any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters())


def parameter_table(model: nn.Module) -> list[tuple[str, int, int]]:
    """(part, trainable, all) parameter counts on this rank, in the order of `Family.parts`, then the rest."""
    compiled = {part: re.compile(pattern) for part, pattern in family_of(model).parts.items()}
    totals = {part: [0, 0] for part in [*compiled, "rest"]}
    for name, parameter in model.named_parameters():
        part = next((part for part, pattern in compiled.items() if pattern.search(name)), "rest")
        size = getattr(parameter, "ds_numel", parameter.numel())
        totals[part][0] += size if parameter.requires_grad else 0
        totals[part][1] += size
    return [(part, trained, total) for part, (trained, total) in totals.items() if total]
