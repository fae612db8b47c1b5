"""Safetensors: the one reader, the one writer, and folders of them as plain transformers lays them out.

`MappedFiles` opens files and lets go of them, `SafetensorsFiles` knows which of several files holds a tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from ds_moe.errors import UserError, shown

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 2**30
MAPPED = 2**24  # bytes read before `SafetensorsFiles` lets go of its files


class MappedFiles:
    """Safetensors files, mapped into memory: a tensor is a view of its file's pages, which are read when it is.

    Pages that were touched count as memory of this process for as long as anything refers to the file. Therefore this
    object lets go of all its files after `limit` bytes, and opens them again when they are needed. A caller should not
    keep tensors that it has copied. Raises what the library raises: OSError and SafetensorError.
    """

    def __init__(self, limit: int) -> None:
        self.bytes_read = 0  # of the tensors handed out so far
        self._limit = limit
        self._open: dict[Path, safe_open] = {}
        self._mapped = 0  # bytes, of the files that are open

    def _file(self, file: Path) -> safe_open:
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file]

    def names(self, file: Path) -> list[str]:
        return list(self._file(file).keys())

    def shape(self, file: Path, name: str) -> tuple[int, ...]:
        return tuple(self._file(file).get_slice(name).get_shape())

    def read(self, file: Path, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows [start, stop) of a tensor; all of one without dimensions."""
        part = self._file(file).get_slice(name)
        value = part[start:stop] if part.get_shape() else self._file(file).get_tensor(name)
        self.bytes_read += value.nbytes
        self._mapped += value.nbytes
        if self._mapped > self._limit:
            self.close()
        return value

    def close(self) -> None:
        """Let go of all files; reading opens them again."""
        self._open, self._mapped = {}, 0


class SafetensorsFiles:
    """The tensors of safetensors files that belong together. Making it reads the files' headers, and no tensor.

    Raises:
        UserError: with the message that `refusal` makes of file and error, for one that is missing, cut short or no
            safetensors.
    """

    def __init__(self, files: Iterable[Path], refusal: Callable[[Path, Exception], str]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}  # of every tensor, by name
        self._files = list(files)
        self._file_of: dict[str, Path] = {}
        self._mapped = MappedFiles(MAPPED)
        for file in self._files:
            try:
                for name in self._mapped.names(file):
                    self.shapes[name] = self._mapped.shape(file, name)
                    self._file_of[name] = file
            except (OSError, SafetensorError) as error:
                raise UserError(refusal(file, error)) from error
            finally:
                self._mapped.close()

    @classmethod
    def of_folder(cls, folder: Path) -> SafetensorsFiles:
        """Those of a folder, one file or several with an index. Raises `UserError` for a missing or broken one."""
        return cls(_weight_paths(folder), lambda file, error: f"{file} is broken ({error}); fetch it again")

    @classmethod
    def find(cls, path: str) -> SafetensorsFiles | None:
        """Those of a run's `model.path`, a folder or a hub id (downloaded first); None for weights in another format.

        Raises `UserError` for a file that cannot be read, with the key of the run file.
        """
        optional = {"_raise_exceptions_for_missing_entries": False}
        if single := cached_file(path, WEIGHTS, **optional):
            files = [single]
        elif index := cached_file(path, INDEX, **optional):
            shard_names(Path(index))  # refuses an index that leads out of its folder
            files, _ = get_checkpoint_shard_files(path, index)
        else:
            return None
        return cls(map(Path, files), lambda file, error: f"model.path {path!r}: {file.name} cannot be read: {error}")

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def bytes(self) -> int:
        """Size of the files."""
        return sum(file.stat().st_size for file in self._files)

    @property
    def bytes_read(self) -> int:
        return self._mapped.bytes_read

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor with at least one row."""
        return self.read(name, 0, 1).dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows [start, stop) of a tensor, see `MappedFiles`; in the dtype of its file, on the CPU."""
        return self._mapped.read(self._file_of[name], name, start, stop)

    def close(self) -> None:
        self._mapped.close()


def _weight_paths(folder: Path) -> list[Path]:
    """One file where it is there, whatever an index says: so transformers chooses too."""
    index = folder / INDEX
    sharded = index.is_file() and not (folder / WEIGHTS).is_file()
    names = shard_names(index) if sharded else [WEIGHTS]
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}" + (f", which {INDEX} names" if sharded else ""))
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


@dataclass(frozen=True)
class Written:
    """Files with weights, their number of parameters and bytes."""

    files: list[str]
    parameters: int
    bytes: int


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
    named: Callable[[str], dict[str, Tensor]],
    note: Callable[[str], None] = lambda line: None,
) -> Written:
    """Write one file after the other, and an index if there are several; one file's tensors are in memory at a time.

    Args:
        plan: keys of each file, see `shards`.
        named: what a file holds for a key, by name.
        note: is told of every file that was written.

    Raises:
        UserError: a file that cannot be written.
    """
    weight_map: dict[str, str] = {}
    parameters = size = 0
    for number, keys in enumerate(plan, start=1):
        file = out / (WEIGHTS if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors")
        tensors = {name: tensor.contiguous() for key in keys for name, tensor in named(key).items()}
        try:
            write_tensors(file, tensors)
        except (OSError, SafetensorError) as error:  # of a full disk safetensors makes the second
            raise UserError(f"{file} cannot be written ({error})") from error
        weight_map |= dict.fromkeys(tensors, file.name)
        parameters += sum(tensor.numel() for tensor in tensors.values())
        size += file.stat().st_size
        note(f"{file.name}: {file.stat().st_size / 1e9:.3g} GB ({number} of {len(plan)})")
        del tensors  # before the next file's are made
    if len(plan) > 1:
        index = {"metadata": {"total_size": size, "total_parameters": parameters}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=2))
    return Written(sorted(set(weight_map.values())), parameters, size)


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
