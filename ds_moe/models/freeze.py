"""Which parameters a run trains: all but what is frozen, or low-rank updates of a frozen model."""

import re

from torch import nn
from transformers import PreTrainedModel

from ds_moe.config.run import RunConfig
from ds_moe.errors import UserError
from ds_moe.models.families import expert_state, family_of
from ds_moe.models.lora import add_lora
from ds_moe.models.matrices import hidden_matrices


def set_trainable(model: PreTrainedModel, config: RunConfig) -> None:
    """Freeze what a run does not train of an unconverted model, and add the low-rank updates it trains instead.

    Raises `UserError` where nothing is left to train, or a pattern or target matches nothing.
    """
    if config.lora is not None:
        add_lora(model, config.lora, config.train.seed)
    else:
        patterns = list(config.model.freeze)
        if config.train.stage == "router_only":
            patterns.append(rf"^(?!.*{family_of(model).parts['router']})")
        freeze(model, patterns)
    if config.train.optimizer == "muon" and not hidden_matrices(model):
        raise UserError(
            f"{config.at('train.optimizer')}: train.optimizer muon: nothing that is trained is a matrix of a hidden "
            "layer; leave it out"
        )


def freeze(model: PreTrainedModel, patterns: list[str]) -> None:
    """Stop training the parameters that a pattern names: a part of `Family.parts`, or a regex.

    Raises `UserError` for a pattern that matches nothing, or where nothing is left to train.
    """
    family = family_of(model)
    parts = family.parts
    for name, parameter in model.named_parameters():
        if re.search(family.frozen, name):
            parameter.requires_grad_(False)
    for pattern in patterns:
        expression = re.compile(parts.get(pattern, pattern))
        matched = [parameter for name, parameter in model.named_parameters() if expression.search(name)]
        if not matched:
            raise UserError(f"model.freeze pattern {pattern!r} matches no parameter of this model")
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"model.freeze {patterns} leaves nothing to train")
    if not any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters()):
        # Hidden states must carry a gradient from the first layer on. Else ZeRO-3 partitions a trained router of that
        # layer again before its gradient has arrived: DeepSpeed's hook for the end of a module's backward fires at its
        # beginning when no input of the module needs a gradient.
        model.enable_input_require_grads()


def trained_experts(model: nn.Module) -> bool:
    """Whether any weight of an expert is trained, or an update of one."""
    named = model.named_parameters()
    return any(parameter.requires_grad for name, parameter in named if expert_state(name))


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
