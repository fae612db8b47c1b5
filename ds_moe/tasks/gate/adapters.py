"""Finds and reads LoRA adapters that PEFT has written, and refuses those that are more than low-rank updates.

Shapes: r is the rank of an adapter in a layer; `in` and `out` are the sizes of the layer.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from ds_moe.config.tasks import GateConfig
from ds_moe.data.chat import TAKEN_KINDS
from ds_moe.errors import UserError, shown
from ds_moe.models.families import family_of

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KEY = "base_model.model.{module}.lora_{side}.weight"
_PEFT_NAME = "default"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# Keys that may differ from PEFT's default, because they say where the updates are, how large, or how they were trained.
# Any other key is refused: it changes what is computed (DoRA, a bias, trained embeddings, ...) or is unknown.
_PLAIN = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_PLAIN |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
_PLAIN |= {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
_PLAIN |= {"inference_mode", "lora_dropout", "init_lora_weights", "megatron_core"}
_PLAIN |= {"eva_config", "corda_config", "lora_ga_config", "loftq_config"}  # these concern the initialisation only
# Initialisations that do not change the base; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) rewrite its weights.
_PLAIN_INIT = (True, False, "gaussian", "eva", "orthogonal")


@dataclass
class Adapter:
    """One PEFT folder."""

    name: str
    path: Path
    config: peft.LoraConfig
    tensors: dict[str, Tensor]  # by PEFT's key: lora_A (r, in) and lora_B (out, r) of each layer, on the CPU

    @property
    def modules(self) -> list[str]:
        """The module paths of the layers that it updates, in the order of the file."""
        found = (_KEY.fullmatch(key) for key in self.tensors)
        return [match["module"] for match in found if match and match["side"] == "A"]

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """lora_A (r, in) and lora_B (out, r) of a layer that it updates."""
        return self.tensors[KEY.format(module=module, side="A")], self.tensors[KEY.format(module=module, side="B")]


@dataclass
class Update:
    """What an adapter adds to one layer: scale * B A x."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    scale: float


def find_adapters(explicit: dict[str, str], folder: str | None) -> dict[str, Path]:
    """The adapters' folders by name: the explicit ones, then the subfolders of `folder` that hold one, sorted.

    Raises:
        UserError: fewer than two adapters, a name that is given twice or cannot name a folder, or a folder that holds
            no adapter.
    """
    found = {name: Path(path) for name, path in explicit.items()}
    for name in found:
        if name in ("", ".", "..") or Path(name).name != name:
            raise UserError(f"adapter name {name!r} cannot name a folder: leave out slashes")
    if folder is not None:
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder of adapters")
        inside = {path.parent.name: path.parent for path in sorted(Path(folder).glob(f"*/{CONFIG}"))}
        if twice := sorted(found.keys() & inside):
            raise UserError(f"adapter {twice[0]!r} is given by name and found in {folder}: rename one of them")
        found |= inside
    if len(found) < 2:
        where = f" in {folder}" if folder is not None else ""
        how_many = f"only {next(iter(found))!r}" if found else "none"
        raise UserError(f"a gate needs at least 2 adapters, found {how_many}{where}: give folders that hold {CONFIG}")
    for name, path in found.items():
        if name in TAKEN_KINDS:
            raise UserError(f"adapter name {name!r} is that of an evaluation's own row: rename the adapter")
        _check_files(name, path)
    return found


def adapter_files(config: GateConfig) -> dict[str, list[Path]]:
    """The files of each adapter of a run: its weights, and its config, which holds the scaling of the weights."""
    folders = find_adapters(config.adapters, config.adapters_in)
    return {name: [folder / WEIGHTS, folder / CONFIG] for name, folder in folders.items()}


def _check_files(name: str, path: Path) -> None:
    if not (path / CONFIG).is_file():
        raise UserError(f"adapter {name!r}: {path} holds no {CONFIG}; give a folder that PEFT's save_pretrained wrote")
    if not (path / WEIGHTS).is_file():
        pickled = (path / PICKLE).is_file()
        why = f"{PICKLE} is a pickle, which can run code; save it as safetensors" if pickled else f"no {WEIGHTS}"
        raise UserError(f"adapter {name!r}: {path}: {why}")


def read_adapter(name: str, path: Path) -> Adapter:
    """Read one folder, to the CPU, in the precision of its file.

    Raises:
        UserError: a file is missing or unreadable, or the adapter is not plain LoRA on linear layers.
    """
    _check_files(name, path)
    config = _read_config(path / CONFIG)
    file = path / WEIGHTS
    try:
        tensors = load(file.read_bytes())  # not mapped, because somebody may overwrite the file during the run
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({error}); save the adapter again") from error
    adapter = Adapter(name, path, config, tensors)
    _check_tensors(adapter)
    return adapter


def _read_config(file: Path) -> peft.LoraConfig:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error}); save the adapter again") from error
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind != "LORA":
        raise UserError(f"{file}: peft_type is {shown(kind)}; a gate mixes adapters of type 'LORA' only")
    _check_values(file, values)
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}  # `_check_values` has found the others empty
    try:
        return peft.LoraConfig(**{key: value for key, value in values.items() if key in known})
    except Exception as error:  # PEFT uses values before it checks their types, so it may raise anything
        raise UserError(f"{file}: PEFT {peft.__version__} refuses it ({_reason(error)})") from error


def _check_values(file: Path, values: dict[str, Any]) -> None:
    # An empty value switches a feature off, whatever its type and its default.
    defaults = {field.name: field.default for field in dataclasses.fields(peft.LoraConfig)}
    for key, value in values.items():
        if key not in _PLAIN and value and value != defaults.get(key, False):
            raise UserError(
                f"{file}: {key}={shown(value)} is more than the plain low-rank update of linear layers that a "
                "gate can mix: train the adapter without it"
            )
    init = values.get("init_lora_weights", True)
    if init not in _PLAIN_INIT:
        raise UserError(
            f"{file}: init_lora_weights={shown(init)} changed the base's own weights; turn it into a plain adapter "
            "with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def _check_tensors(adapter: Adapter) -> None:
    file = adapter.path / WEIGHTS
    for key, tensor in adapter.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(
                f"{file}: {key[:120]} is no LoRA weight of a linear layer: train the adapter on linear layers only"
            )
        other = KEY.format(module=match["module"], side="B" if match["side"] == "A" else "A")
        if other not in adapter.tensors:
            raise UserError(f"{file}: {key} without {other}: the file is incomplete; save the adapter again")
        rank_dim = 0 if match["side"] == "A" else 1
        if tensor.dim() != 2 or tensor.shape[rank_dim] != adapter.tensors[other].shape[1 - rank_dim]:
            raise UserError(f"{file}: {key} {tuple(tensor.shape)} does not fit {other}: save the adapter again")
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise UserError(f"{file}: {key} ({tensor.dtype}) holds more than finite floats: train the adapter anew")
    if not adapter.tensors:
        raise UserError(f"{file}: holds no weights; save the adapter again")


def updates(adapter: Adapter, model: nn.Module) -> dict[str, Update]:
    """The update of each nn.Linear of `model` that the adapter targets, by module path. PEFT finds rank and scaling.

    Raises:
        UserError: the adapter does not fit the model, or updates its vision tower.
    """
    modules = dict(model.named_modules())
    for name in adapter.modules:
        _check_target(adapter, name, modules, reads_screens=family_of(model).is_vision(name))
    outline = nn.Module()
    for name, module in modules.items():
        if type(module) is nn.Linear:
            _place(outline, name, nn.Linear(module.in_features, module.out_features, device="meta"))
    try:
        # On meta, because a config may claim any rank, and nothing of that size should be allocated.
        with torch.device("meta"):
            peft.inject_adapter_in_model(copy.deepcopy(adapter.config), outline, _PEFT_NAME)
    except Exception as error:  # the config may hold values of another type than PEFT expects, or a broken regex
        raise UserError(f"adapter {adapter.path}: PEFT cannot place it in this model ({_reason(error)})") from error
    made = {name: module for name, module in outline.named_modules() if isinstance(module, LoraLayer)}
    if differ := sorted(made.keys() ^ set(adapter.modules)):
        lacks = "weights for it" if differ[0] in made else "target_modules that name it"
        raise UserError(f"adapter {adapter.path}: {differ[0]}: the folder has no {lacks}; save the adapter again")
    for name, module in made.items():
        if (rank := len(adapter.pair(name)[0])) != (said := module.r[_PEFT_NAME]):
            raise UserError(f"adapter {adapter.path}: {name} has rank {rank}, its {CONFIG} says {said}; save it again")
        if not math.isfinite(module.scaling[_PEFT_NAME]):
            raise UserError(f"{adapter.path / CONFIG}: lora_alpha is no finite number: train the adapter anew")
    return {name: Update(*adapter.pair(name), module.scaling[_PEFT_NAME]) for name, module in made.items()}


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _check_target(adapter: Adapter, name: str, modules: dict[str, nn.Module], reads_screens: bool) -> None:
    where = f"adapter {adapter.path}: {name}"
    if reads_screens:
        raise UserError(
            f"{where}: the gate reads the screen through the vision tower, which therefore has to stay the same "
            "for all adapters; train adapters on the language model only"
        )
    module = modules.get(name)
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
