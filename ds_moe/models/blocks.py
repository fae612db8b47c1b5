"""Finds a model's MoE blocks by what their modules say, and refuses what no layer of ours can compute."""

from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ds_moe.errors import UserError
from ds_moe.models.families import DESCRIBED, IMAGE_BLOCKS, REFUSED, TEXT_BLOCKS, expert_state

ROUTER_NAMES = ("gate", "router")  # of a block's child


class FoundBlock(NamedTuple):
    """A module of a family whose forward calls a router and `experts`.

    Attributes:
        path: of the block in the model.
    """

    path: str
    module: nn.Module

    @property
    def experts(self) -> nn.Module:
        return self.module.get_submodule("experts")

    @property
    def experts_path(self) -> str:
        return f"{self.path}.experts"

    @property
    def router_name(self) -> str:
        return next(name for name in ROUTER_NAMES if name in self.module._modules)

    @property
    def router(self) -> nn.Module:
        return self.module.get_submodule(self.router_name)

    @property
    def num_experts(self) -> int:
        return len(next(iter(self.experts._parameters.values())))


def moe_blocks(model: nn.Module) -> list[FoundBlock]:
    """Every MoE block of an unconverted model whose experts transformers calls by `use_experts_implementation`."""
    return [FoundBlock(name, module) for name, module in model.named_modules() if _says_how(module)]


def _says_how(module: nn.Module) -> bool:
    experts = module._modules.get("experts")
    for name, value in DESCRIBED.get(type(experts).__name__, {}).items():
        setattr(experts, name, value)
    described = experts is not None and hasattr(experts, "has_gate") and hasattr(type(experts), "_apply_gate")
    return described and any(name in module._modules for name in ROUTER_NAMES)


def refusal(config: PretrainedConfig) -> str | None:
    """Why the experts of models with this config are none that layers of ours are known to compute; None: they are."""
    kinds = config.model_type, config.get_text_config().model_type
    for kind in kinds:
        if reason := REFUSED.get(kind):
            return f"the experts of a {kind} model cannot be trained: {reason}"
    if not (TEXT_BLOCKS | IMAGE_BLOCKS).intersection(kinds):
        known = ", ".join(sorted(TEXT_BLOCKS | IMAGE_BLOCKS))
        return f"model_type {kinds[0]!r} has no experts that are known; known: {known}"
    return None


def convertible_blocks(model: PreTrainedModel, ep_size: int) -> list[FoundBlock]:
    """`moe_blocks`, all of which our layers can compute.

    Raises:
        UserError: a family that is refused by name; no block; experts outside of the decoder; experts that
            `ep_size` does not divide, or whose parameters are not one row an expert.
    """
    model_type = model.config.model_type
    if reason := refusal(model.config):
        raise UserError(reason)
    blocks = moe_blocks(model)
    if not blocks:
        raise UserError(f"the {model_type} model has no MoE block that is known; nothing to convert")
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    for block in blocks:
        if id(block.module) not in inside:
            raise UserError(f"{block.path} has experts outside of the decoder, which cannot be trained")
        if block.num_experts % ep_size:
            raise UserError(f"moe.ep_size={ep_size} does not divide the model's {block.num_experts} experts")
        for name, parameter in block.experts.named_parameters():
            if not expert_state(f".experts.{name}") or len(parameter) != block.num_experts:
                raise UserError(
                    f"{block.experts_path}.{name} is no weight with one row an expert: it cannot be sharded"
                )
    sharded = {f"{block.experts_path}.{name}" for block in blocks for name, _ in block.experts.named_parameters()}
    taken_for = {name for name, _ in model.named_parameters() if expert_state(name)}
    if odd := sorted(sharded ^ taken_for):
        raise UserError(f"{odd[0]}: its name does not tell whether it is a weight of sharded experts")
    return blocks
