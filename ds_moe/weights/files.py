"""Folders of plain transformers: reading weights tensor by tensor, writing them in shards, the layouts of experts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ds_moe.errors import UserError, shown

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 2**30


@dataclass(frozen=True)
class Written:
    """Files with weights, their number of parameters and bytes."""

    files: list[str]
    parameters: int
    bytes: int


class WeightFiles:
    """Reads the safetensors of a folder, one file or several with an index, tensor by tensor. Opening reads headers.

    Attributes:
        shapes: of every tensor, by name.
        bytes: of all files.

    Raises:
        UserError: no safetensors, or a shard that is missing or broken, by name.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, list[int]] = {}
        self.bytes = 0
        self._files: dict[str, Any] = {}
        for path in _weight_paths(folder):
            try:
                file: Any = safe_open(path, framework="pt")
                names = list(file.keys())
                self.shapes |= {name: file.get_slice(name).get_shape() for name in names}
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} is broken ({error}); fetch it again") from error
            self._files |= dict.fromkeys(names, file)
            self.bytes += path.stat().st_size

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    def read(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor with at least one row, which is all that is read."""
        return self._files[name].get_slice(name)[:1].dtype


def _weight_paths(folder: Path) -> list[Path]:
    index = folder / INDEX
    names = shard_names(index) if index.is_file() else [WEIGHTS]
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}" + (f", which {INDEX} names" if index.is_file() else ""))
    return [folder / name for name in names]


def shard_names(index: Path) -> list[str]:
    """Files of an index of safetensors. Raises `UserError` for what is none, or names a file outside of its folder."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is no index of safetensors ({error})") from error
    if outside:
        raise UserError(f"{index} names {shown(outside[0])}: shards lie beside their index; fetch the model again")
    return names


def check_empty(out: Path) -> None:
    """Raises `UserError` where `out` exists and holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: choose another folder or remove it")


def make_folder(out: Path) -> None:
    """Raises `UserError` where it cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another folder") from error


def shards(sizes: dict[str, int], most: int) -> list[list[str]]:
    """Keys in order, cut into files of at most `most` bytes."""
    plan: list[list[str]] = [[]]
    room = most
    for key, size in sizes.items():
        if plan[-1] and size > room:
            plan.append([])
            room = most
        plan[-1].append(key)
        room -= size
    return plan


def write_weights(
    out: Path,
    plan: list[list[str]],
    named: Callable[[str], tuple[str, Tensor]],
    note: Callable[[str], None] = lambda line: None,
) -> Written:
    """Write one file after the other, and an index if there are several; one file's tensors are in memory at a time.

    Args:
        plan: keys of each file, see `shards`.
        named: a key's name in the file, and its tensor as it is to be stored.
        note: is told of every file that was written.

    Raises:
        UserError: a file that cannot be written.
    """
    weight_map: dict[str, str] = {}
    parameters = size = 0
    for number, keys in enumerate(plan, start=1):
        file = WEIGHTS if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in map(named, keys)}
        _write(out / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        parameters += sum(tensor.numel() for tensor in tensors.values())
        size += (out / file).stat().st_size
        note(f"{file}: {(out / file).stat().st_size / 1e9:.3g} GB ({number} of {len(plan)})")
        del tensors  # before the next file's are made
    if len(plan) > 1:
        index = {"metadata": {"total_size": size, "total_parameters": parameters}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=2))
    return Written(sorted(set(weight_map.values())), parameters, size)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        write_tensors(path, tensors)
    except (OSError, RuntimeError) as error:  # safetensors wraps a full disk in an error of its own
        raise UserError(f"{path} cannot be written ({error})") from error


def dtype_name(dtype: torch.dtype) -> str:
    """As a config.json says it."""
    return str(dtype).removeprefix("torch.")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write safetensors to the disk itself, with the permissions of any other new file (the library leaves 0600)."""
    save_file(tensors, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
