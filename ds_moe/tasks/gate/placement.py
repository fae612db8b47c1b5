"""Where an adapter's updates belong in a model, and whether it fits there.

Names of layers are compared without what stands before a layer's own path, which differs between versions of
transformers and between trainers (`language_model.`); PEFT itself finds rank and scaling, under the names of the file.
"""

import copy
import math
import re
import warnings
from dataclasses import dataclass, replace
from itertools import chain
from typing import cast

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_moe.errors import UserError, shown
from ds_moe.models.families import in_vision_tower
from ds_moe.models.streaming import stored_value
from ds_moe.tasks.gate.adapters import CONFIG, WEIGHTS, WRAPPER, Adapter, reason
from ds_moe.weights.unread import is_unread

_PEFT_NAME = "default"
_PREFIX = re.compile(r"(?:(?:base_model|model|language_model)\.)*")
_EXPERTS = re.compile(r"\.experts\b")


@dataclass
class Update:
    """What an adapter adds to one layer: scale * B A x."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    scale: float


def updates(adapter: Adapter, model: nn.Module) -> dict[str, Update]:
    """The update of each nn.Linear of `model` that the adapter targets, by module path. PEFT finds rank and scaling.

    Raises:
        UserError: the adapter does not fit the model, updates its vision tower, or holds weights that are neither
            updates nor the model's own.
    """
    adapter = placed(adapter, model)
    modules = dict(model.named_modules())
    for name in adapter.modules:
        _check_target(adapter, name, modules)
    _compare_with_base(adapter, model)
    outline = nn.Module()
    prefixes = {_prefix(name): _prefix(path) for name, path in adapter.paths.items()}
    for name, module in modules.items():
        if type(module) is nn.Linear:  # called as in the file, since the config's patterns are for these names
            path = prefixes.get(_prefix(name), _prefix(name)) + _without_prefix(name)
            _place(outline, path, nn.Linear(module.in_features, module.out_features, device="meta"))
    try:
        # On meta, because a config may claim any rank, and nothing of that size should be allocated.
        with torch.device("meta"):
            config = copy.deepcopy(adapter.config)
            config.modules_to_save = None
            peft.inject_adapter_in_model(config, outline, _PEFT_NAME)
    except Exception as error:  # the config may hold values of another type than PEFT expects, or a broken regex
        raise UserError(f"adapter {adapter.path}: PEFT cannot place it in this model ({reason(error)})") from error
    here = {path: name for name, path in adapter.paths.items()}
    layers = {path: module for path, module in outline.named_modules() if isinstance(module, LoraLayer)}
    for pattern in adapter.config.alpha_pattern or ():
        if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in layers):  # as PEFT reads it
            lack = f"alpha_pattern names {shown(pattern)}, which is none of the adapter's layers"
            raise UserError(f"{adapter.path / CONFIG}: {lack}, so a scaling would be lost: remove it or save it again")
    made = {here.get(path, path): module for path, module in layers.items()}
    if differ := sorted(made.keys() ^ set(adapter.modules)):
        lacks = "weights for it" if differ[0] in made else "target_modules that name it"
        raise UserError(f"adapter {adapter.path}: {differ[0]}: the folder has no {lacks}; save the adapter again")
    for name, module in made.items():
        if (rank := len(adapter.pair(name)[0])) != (said := module.r[_PEFT_NAME]):
            raise UserError(f"adapter {adapter.path}: {name} has rank {rank}, its {CONFIG} says {said}; save it again")
        if not math.isfinite(module.scaling[_PEFT_NAME]):
            raise UserError(f"{adapter.path / CONFIG}: lora_alpha is no finite number: train the adapter anew")
    return {name: Update(*adapter.pair(name), module.scaling[_PEFT_NAME]) for name, module in made.items()}


def placed(adapter: Adapter, model: nn.Module) -> Adapter:
    """The adapter with its layers called as in `model`, where only what stands before their own paths differs.

    Raises:
        UserError: two of its layers are one of the model.
    """
    modules = {_without_prefix(name): name for name, _ in model.named_modules()}
    known = set(modules.values())
    paths: dict[str, str] = {}
    for path in adapter.modules:
        name = path if path in known else modules.get(_without_prefix(path), path)
        if name in paths:
            raise UserError(f"adapter {adapter.path}: {paths[name]} and {path} are one layer: save the adapter again")
        paths[name] = path
    differ = {name: path for name, path in paths.items() if name != path}
    if not differ:
        return adapter
    name, path = next(iter(differ.items()))
    warnings.warn(f"adapter {adapter.path}: {path} is read as {name} ({len(differ)} layers)", stacklevel=2)
    return replace(adapter, paths=differ)


def _without_prefix(name: str) -> str:
    return _PREFIX.sub("", name, count=1)


def _prefix(name: str) -> str:
    return name[: len(name) - len(_without_prefix(name))]


def _compare_with_base(adapter: Adapter, model: nn.Module) -> None:
    """Refuse what the file holds beside updates, unless it is the model's own. On the meta device values may be any."""
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    here = {_without_prefix(name): tensor for name, tensor in named} if adapter.others else {}
    for key, value in adapter.others.items():
        where = f"{adapter.path / WEIGHTS}: {key[:120]}"
        base = here.get(_without_prefix(WRAPPER.sub("", key)))
        if base is None:
            what = "neither a low-rank update of a linear layer nor a weight of this model"
            raise UserError(f"{where} is {what}: give the base that the adapter was trained on, or leave it out")
        if value.shape != base.shape:
            sizes = f"{tuple(value.shape)}, in this model {tuple(base.shape)}"
            raise UserError(f"{where} is {sizes}: give the base that the adapter was trained on (its vocabulary grew?)")
        if is_unread(base):
            base = stored_value(cast(PreTrainedModel, model), base)
        dtype = min(value.dtype, base.dtype, key=lambda one: one.itemsize)  # a copy may have been rounded
        comparable = value.is_floating_point() == base.is_floating_point()
        if not base.is_meta and not (comparable and torch.equal(value.to(base.device, dtype), base.to(dtype))):
            raise UserError(
                f"{where} differs from the model's own: the adapter trained it beside its low-rank updates, which are "
                "all that a gate can mix; train the adapter without it (modules_to_save), or give the base that has it"
            )


def _check_target(adapter: Adapter, name: str, modules: dict[str, nn.Module]) -> None:
    where = f"adapter {adapter.path}: {name}"
    if in_vision_tower(name):
        why = "the gate reads the screen through the vision tower, which therefore has to stay the same"
        raise UserError(f"{where}: {why} for all adapters; train adapters on the language model only")
    module = modules.get(name)
    if type(module) is not nn.Linear and _EXPERTS.search(name):
        why = "of experts, which transformers keeps fused, and a gate mixes updates of linear layers only"
        raise UserError(f"{where} is {why}: train the adapter without the experts")
    if module is None:
        raise UserError(f"{where} is no module of this model: give the base that the adapter was trained on")
    if type(module) is not nn.Linear:
        kind = type(module).__name__
        raise UserError(f"{where} is a {kind}, no plain nn.Linear: leave it out of the adapter's target_modules")
    A, B = adapter.pair(name)
    here, there = f"{module.in_features} to {module.out_features}", f"{A.shape[1]} to {B.shape[0]}"
    if here != there:
        raise UserError(f"{where} maps {here} in this model and {there} in the adapter: it is of another base")


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)
