"""Dense Qwen3-VL checkpoints that a MoE is made of: opened, compared with each other, read tensor by tensor."""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import PretrainedConfig

from ds_moe.config.rules.model import expert_count
from ds_moe.errors import UserError
from ds_moe.models.families import ASSEMBLED
from ds_moe.models.folder import read_model_config
from ds_moe.models.load import build_outline
from ds_moe.models.ties import equal_values, ties_of
from ds_moe.weights.files import SafetensorsFiles

FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja"]  # of a hub repository
NO_EFFECT = {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures"}  # on what is computed
MANY = 5  # differences that a message names; it counts the others


@dataclass
class DenseModel:
    """One checkpoint."""

    path: str  # as the spec has it
    folder: Path
    config: PretrainedConfig
    weights: SafetensorsFiles
    shapes: dict[str, tuple[int, ...]]  # of every weight that this config has, in its order, but for a tied lm_head

    def read(self, name: str) -> Tensor:
        return self.weights.read(name)

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype(next(iter(self.shapes)))


def open_dense(path: str) -> DenseModel:
    """Open a checkpoint, in a folder or on the hub, from where it is fetched if it is not in the cache.

    Raises:
        UserError: the path is neither, the model is of another kind, or weights do not fit its config, by name.
    """
    folder = _folder(path)
    config = read_model_config(folder, path)
    if config.model_type not in ASSEMBLED:
        experts, dense = expert_count(config), " and ".join(ASSEMBLED)
        kind = f", which has {experts} experts already" if experts else ""
        raise UserError(f"{path} is a {config.model_type}{kind}; only dense {dense} checkpoints can be assembled")
    weights = SafetensorsFiles.of_folder(folder)
    state, ties = build_outline(config).state_dict(), ties_of(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in ties}
    problems = list(_misfits(weights.shapes, shapes, ties.keys())) or [
        f"tie_word_embeddings is true, but {head} differs from {embedding}; set it to false in its config.json"
        for head, embedding in ties.items()
        if head in weights.shapes and not equal_values(weights, head, embedding, weights.dtype(embedding))
    ]
    if problems:
        raise UserError(f"{path} does not fit its own config: {_some(problems)}")
    return DenseModel(path, folder, config, weights, shapes)


def check_sibling(model: DenseModel, first: DenseModel) -> None:
    """Raise `UserError`, with the keys that differ, unless both have the same config and tokenizer."""
    differing = list(_differences(model.config.to_dict(), first.config.to_dict()))
    if differing:
        raise UserError(f"{model.path} does not fit {first.path}: {_some(differing)}")
    if _vocabulary(model.folder) != _vocabulary(first.folder):
        raise UserError(f"{model.path} does not fit {first.path}: their tokenizer.json give tokens other ids")


def _folder(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} is no folder, and no hub id that can be fetched ({reason})") from error


def _misfits(
    found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], allowed: Collection[str]
) -> Iterator[str]:
    yield from (f"{name} is missing" for name in wanted if name not in found)
    yield from (f"{name} is unexpected" for name in found if name not in wanted and name not in allowed)
    for name, shape in wanted.items():
        if name in found and found[name] != shape:
            yield f"{name} is {found[name]} and should be {shape}"


def _differences(one: object, other: object, key: str = "") -> Iterator[str]:
    """Every key in which two configs differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted((one.keys() | other.keys()) - NO_EFFECT):
            yield from _differences(one.get(name), other.get(name), f"{key}.{name}".lstrip("."))
    elif one != other:
        yield f"{key} is {one!r}, not {other!r}"


def _vocabulary(folder: Path) -> tuple[object, object] | None:
    """The parts of tokenizer.json that give tokens their ids; None without the file."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    tree = json.loads(file.read_text(encoding="utf-8"))
    return tree.get("model"), tree.get("added_tokens")


def _some(problems: list[str]) -> str:
    more = f" and {len(problems) - MANY} more" if len(problems) > MANY else ""
    return "; ".join(problems[:MANY]) + more
