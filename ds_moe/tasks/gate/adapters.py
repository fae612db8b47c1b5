"""Finds and reads LoRA adapters that PEFT has written, and refuses those that are more than low-rank updates.

Trainers save more beside the updates: a head or embeddings, for `modules_to_save` or a grown vocabulary, or layers of
the base. What equals the base's own weights is passed over.

Shapes: r is the rank of an adapter in a layer; `in` and `out` are the sizes of the layer.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, cast

import peft
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ds_moe.config.tasks import GateConfig
from ds_moe.data.chat import TAKEN_KINDS
from ds_moe.errors import UserError, shown

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KEY = "base_model.model.{module}.lora_{side}.weight"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
WRAPPER = re.compile(r"\.(?:base_layer|original_module|modules_to_save(?:\.default)?)(?=\.)")
# Of names that are none of the above: how the adapter was trained or saved.
_OTHER_LORA = {
    r"lora_[AB]\.\w+\.weight": "the name of a state dict: save the adapter with PEFT's save_pretrained",
    r"^(?!base_model\.model\.).*lora_[AB]\.weight": "PEFT's prefix is missing: save with its save_pretrained",
    r"lora_magnitude_vector": "DoRA: train the adapter without it",
    r"lora_[AB]\.bias": "a bias: train the adapter without lora_bias",
    r"lora_|trainable_tokens_": "train the adapter on linear layers only",
}

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
    others: dict[str, Tensor] = field(default_factory=dict)  # what else its file holds: copies of the base's weights?
    paths: dict[str, str] = field(default_factory=dict)  # path in a model -> in the file, where they differ (`placed`)

    @property
    def modules(self) -> list[str]:
        """The module paths of the layers that it updates, in the order of the file."""
        found = (_KEY.fullmatch(key) for key in self.tensors)
        here = {path: module for module, path in self.paths.items()}
        return [here.get(match["module"], match["module"]) for match in found if match and match["side"] == "A"]

    def key(self, module: str, side: str) -> str:
        return KEY.format(module=self.paths.get(module, module), side=side)

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """lora_A (r, in) and lora_B (out, r) of a layer that it updates."""
        return self.tensors[self.key(module, "A")], self.tensors[self.key(module, "B")]


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
    """Read one folder, to the CPU, in the precision of its file. Raises `UserError` for what is no plain LoRA."""
    _check_files(name, path)
    config = _read_config(path / CONFIG)
    file = path / WEIGHTS
    try:
        tensors = load(file.read_bytes())  # not mapped, because somebody may overwrite the file during the run
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({error}); save the adapter again") from error
    updates = {key: tensor for key, tensor in tensors.items() if _KEY.fullmatch(key)}
    others = {key: tensor for key, tensor in tensors.items() if key not in updates}
    adapter = Adapter(name, path, config, updates, others)
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
        raise UserError(f"{file}: PEFT {peft.__version__} refuses it ({reason(error)})") from error


def _check_values(file: Path, values: dict[str, Any]) -> None:
    # An empty value switches a feature off, whatever its type and its default.
    defaults = {field.name: field.default for field in dataclasses.fields(peft.LoraConfig)}
    for key, value in values.items():
        saved = key == "modules_to_save" and isinstance(value, list) and all(isinstance(name, str) for name in value)
        if key not in _PLAIN and not saved and value and value != defaults.get(key, False):
            what = "more than the plain low-rank update of linear layers that a gate can mix"
            raise UserError(f"{file}: {key}={shown(value)} is {what}: train the adapter without it")
    init = values.get("init_lora_weights", True)
    if init not in _PLAIN_INIT:
        fix = "turn it into a plain adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        raise UserError(f"{file}: init_lora_weights={shown(init)} changed the base's own weights; {fix}")


def _check_tensors(adapter: Adapter) -> None:
    file = adapter.path / WEIGHTS
    for key, tensor in chain(adapter.others.items(), adapter.tensors.items()):
        reasons = [why for other, why in _OTHER_LORA.items() if key in adapter.others and re.search(other, key)]
        if reasons:
            raise UserError(f"{file}: {key[:120]} is no LoRA weight of a linear layer ({reasons[0]})")
        if not tensor.numel():
            fix = "gather it when you save (stage3_gather_16bit_weights_on_model_save)"
            raise UserError(f"{file}: {key[:120]} is empty, as a shard under ZeRO-3 is: {fix}")
    for name in adapter.config.modules_to_save or ():
        if not any(f".{name}." in WRAPPER.sub("", f".{key}") for key in adapter.others):
            lack = f"modules_to_save names {shown(name)}, of which {WEIGHTS} holds nothing"
            raise UserError(f"{adapter.path / CONFIG}: {lack}: the file is incomplete; save the adapter again")
    for key, tensor in adapter.tensors.items():
        match = cast(re.Match[str], _KEY.fullmatch(key))
        other = KEY.format(module=match["module"], side="B" if match["side"] == "A" else "A")
        if other not in adapter.tensors:
            raise UserError(f"{file}: {key} without {other}: the file is incomplete; save the adapter again")
        rank_dim = 0 if match["side"] == "A" else 1
        if tensor.dim() != 2 or tensor.shape[rank_dim] != adapter.tensors[other].shape[1 - rank_dim]:
            raise UserError(f"{file}: {key} {tuple(tensor.shape)} does not fit {other}: save the adapter again")
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise UserError(f"{file}: {key} ({tensor.dtype}) holds more than finite floats: train the adapter anew")
    if not adapter.tensors:
        lack = "low-rank updates" if adapter.others else "weights"
        raise UserError(f"{file}: holds no {lack}; save the adapter again")


def reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
