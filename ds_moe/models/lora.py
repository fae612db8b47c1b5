"""Low-rank training of a model: PEFT's LoRA on linear layers, `moe/expert_lora.py` on experts, all else frozen.

`add_lora` comes before the conversion to expert parallelism, which then gives each rank the updates of its experts.
In files both kinds of update are one PEFT adapter: `update_of` and `peft_value` translate names and values.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import peft
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_moe.config.sections import LoRAConfig
from ds_moe.errors import UserError
from ds_moe.models.blocks import moe_blocks
from ds_moe.models.families import expert_state
from ds_moe.models.hf_experts import unlike_swiglu
from ds_moe.moe.expert_lora import ExpertLoRA

ADAPTER = "default"  # PEFT's name of the one adapter in a model's parameter names
LINEAR = re.compile(rf"(.+)\.lora_([AB])\.{ADAPTER}\.weight")
EXPERTS = re.compile(r"(.+\.experts)\.lora\.(gate_up|down)_([AB])")
# PEFT wraps a module once for every parameter that it targets; the wrapper of the last one is the outermost.
WRAPPED = {"gate_up": "base_layer.", "down": ""}


def add_lora(model: PreTrainedModel, config: LoRAConfig, seed: int) -> None:
    """Freeze an unconverted `model` and give it the updates that `config` asks for.

    `seed` is of the updates of the first MoE layer's experts, and each further layer counts on from it. Raises
    `UserError` for a target that is no linear layer of the model, and for experts that are no plain SwiGLU.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if config.targets:
        _check_targets(model, config.targets)
        excluded = not_linear(model, config.targets)
        peft.inject_adapter_in_model(peft_config(config, config.targets, excluded=excluded), model, ADAPTER)
    blocks = moe_blocks(model)
    for block in blocks if config.experts else ():
        if reason := unlike_swiglu(block.experts):
            what = f"lora.experts cannot update the experts of {model.config.model_type} models"
            raise UserError(f"{what}: {reason}; set it to false")
    for index, block in enumerate(blocks):
        if config.experts:
            weights = (block.experts.gate_up_proj, block.experts.down_proj)
            block.experts.lora = ExpertLoRA(*weights, config.rank, scaling(config), config.dropout, seed + index)
        for parameter in block.router.parameters():
            parameter.requires_grad_(config.train_router)
    model.enable_input_require_grads()  # as `freeze` does where nothing before the first experts is trained


def peft_config(
    config: LoRAConfig,
    targets: list[str],
    target_parameters: list[str] | None = None,
    excluded: list[str] | None = None,
) -> peft.LoraConfig:
    """`excluded` are modules that are left as they are, though they are called like a target."""
    own = {"r": config.rank, "lora_alpha": config.alpha, "use_rslora": config.rslora, "lora_dropout": config.dropout}
    own |= {"target_modules": targets, "exclude_modules": excluded or None}
    return peft.LoraConfig(**own, target_parameters=target_parameters)


def scaling(config: LoRAConfig) -> float:
    """What updates are multiplied by; with `rslora` they keep their size as the rank grows (Kalajdzievski 2023)."""
    return config.alpha / (config.rank**0.5 if config.rslora else config.rank)


def not_linear(model: nn.Module, targets: list[str]) -> list[str]:
    """The modules that are called like a target and are no linear layer, such as the convolution `proj` over patches of
    an image. PEFT would update a convolution by two more, which no export merges."""
    called = [(name, module) for name, module in model.named_modules() if any(_is_called(name, one) for one in targets)]
    return [name for name, module in called if not isinstance(module, nn.Linear)]


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in targets:
        if not any(_is_called(name, target) for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(f"lora.targets: {target!r} is no linear layer of this model; it has {', '.join(known)}")


class UpdateHalf(NamedTuple):
    """A or B of a low-rank update: `weight` gains scaling * B A."""

    weight: str  # name of the base weight, as in the model without LoRA
    half: Literal["A", "B"]
    peft: str  # name of this half in a PEFT adapter file
    stacked: bool  # (E, ., .), one update an expert


def update_of(name: str) -> UpdateHalf | None:
    """Which half of which update a parameter of a model with LoRA is; None for any other parameter."""
    if found := LINEAR.fullmatch(name):
        module, half = found.groups()
        return UpdateHalf(f"{module}.weight", half, f"base_model.model.{module}.lora_{half}.weight", False)
    if (found := EXPERTS.fullmatch(name)) and expert_state(name):
        module, part, half = found.groups()
        in_file = f"base_model.model.{module}.{WRAPPED[part]}lora_{half}.weight"
        return UpdateHalf(f"{module}.{part}_proj", half, in_file, True)
    return None


def stored_name(name: str) -> str:
    """What a parameter is called in the model without LoRA: PEFT puts the linear layers it targets into wrappers."""
    return name.replace(".base_layer.", ".")


def peft_value(update: UpdateHalf, value: Tensor) -> Tensor:
    """An update in the shape PEFT stores it in: experts' A (E r, I), and B (O, r E) with the experts innermost."""
    if not update.stacked:
        return value
    return (value.flatten(0, 1) if update.half == "A" else value.permute(1, 2, 0).flatten(1)).contiguous()


def merged(weight: Tensor, a: Tensor, b: Tensor, factor: float) -> Tensor:
    """`weight + factor * B A`, added up in fp32, in the dtype of `weight`; stacked or not."""
    return (weight.float() + factor * (b.float() @ a.float())).to(weight.dtype)


def coverage(model: nn.Module, ep_size: int = 1) -> list[str]:
    """One line a kind of layer with LoRA: how many there are and how many parameters they train, over all ranks."""
    kinds: dict[str, list[int]] = defaultdict(lambda: [0, 0, 1])
    for name, parameter in model.named_parameters():
        update = update_of(name)
        if update is None:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        kind = kinds[update.weight.removesuffix(".weight").rpartition(".")[2]]
        kind[0] += update.half == "A"
        kind[1] += shape.numel() * (ep_size if update.stacked else 1)
        kind[2] = shape[0] * ep_size if update.stacked else 1
    return [
        f"{kind:<12}{layers:>4} layers" + (f" x {experts} experts" if experts > 1 else "") + f", {total:,} parameters"
        f"{f', {total // (layers * experts):,} an expert' if experts > 1 else ''}"
        for kind, (layers, total, experts) in kinds.items()
    ]


@contextmanager
def without_updates(model: nn.Module) -> Iterator[None]:
    """The model computes as its base does: every low-rank update is multiplied by 0.

    The updates are still computed. So ZeRO-3 sees the same modules in the same order as in training, and goes on to
    fetch weights ahead of their use.
    """
    linear = [module for module in model.modules() if isinstance(module, LoraLayer)]
    of_experts = [module for module in model.modules() if isinstance(module, ExpertLoRA)]
    scalings = [dict(module.scaling) for module in linear], [module.scaling for module in of_experts]
    try:
        for module in linear:
            module.scaling = dict.fromkeys(module.scaling, 0.0)
        for module in of_experts:
            module.scaling = 0.0
        yield
    finally:
        for module, scaling in zip(linear + of_experts, scalings[0] + scalings[1], strict=True):
            module.scaling = scaling
