"""The files of a checkpoint: what a whole one looks like, and how to read tensors from it. Needs no DeepSpeed.

    <output_dir>/checkpoints/step_00000120/
        rank-00000.safetensors ...  fp32 weights and Adam moments by parameter name; experts as blocks of rows
        rng-00000.safetensors ...   this rank's random states
        state.json                  step, data position, topology, Adam's step, versions
        run.yaml, deepspeed.json    the resolved run
        model/                      config, generation config and processor of the model
        manifest.json               every file with size and SHA-256, every tensor with its place; written last

Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ds_moe.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step_(\d{8})")


def newest_complete(folder: Path, note: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint below `folder` that is whole; those passed over are noted with the reason."""
    for path in step_folders(folder):
        problem = incomplete(path)
        if problem is None:
            return path
        note(f"checkpoint {path} is not usable: {problem}; trying the one before it")
    return None


def incomplete(path: Path) -> str | None:
    """Why a checkpoint folder cannot be used, naming the file, or None if every file has its size."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"manifest.json has format {manifest['format']}, this version reads {FORMAT}"
        for name, entry in manifest["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != entry["size"]:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {entry['size']}"
    except (OSError, KeyError, ValueError) as error:
        return f"manifest.json cannot be read ({error})"
    return None


def damaged(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """The first file whose content is not the manifest's, or None; looks at every `shares`-th file from `share` on."""
    for name, entry in sorted(read_manifest(path)["files"].items())[share::shares]:
        if sha256_of(path / name) != entry["sha256"]:
            return f"{name} is damaged: its SHA-256 is not the manifest's"
    return None


def find_checkpoint(source: Path) -> Path:
    """A checkpoint folder, or the newest whole one of a run's output folder.

    Raises:
        UserError: neither, or a damaged one.
    """
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    found = newest_complete(folder) or source
    problem = incomplete(found) or damaged(found)
    if problem is not None:
        raise UserError(f"{found} is no whole checkpoint and no run with one: {problem}")
    return found


class Reader:
    """Reads whole tensors, or some of their first rows, from a checkpoint's pieces; nothing else is loaded."""

    def __init__(self, path: Path, manifest: dict[str, Any] | None = None) -> None:
        self.path = path
        self.tensors = (manifest or read_manifest(path))["tensors"]
        self._files: dict[str, Any] = {}

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self.path / name, framework="pt")
        return self._files[name]

    def shape(self, key: str) -> list[int]:
        """The whole tensor's shape."""
        pieces = self.tensors[key]
        shape = self._file(pieces[0][0]).get_slice(key).get_shape()
        return [max(piece[2] for piece in pieces), *shape[1:]] if shape else shape

    def read(self, key: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor `kind/name`, or its rows [start, stop) of the first dimension.

        Raises:
            UserError: the checkpoint holds no such tensor or not all of these rows.
        """
        pieces = sorted(self.tensors.get(key, []), key=lambda piece: piece[1])
        if not pieces:
            raise UserError(f"checkpoint {self.path} holds no {key}")
        start, stop = rows or (0, pieces[-1][2])
        parts, position = [], start
        for name, first, last in pieces:
            if first <= position < min(last, stop):
                if last - first == 1 and not self._file(name).get_slice(key).get_shape():
                    return self._file(name).get_tensor(key)
                parts.append(self._file(name).get_slice(key)[position - first : min(last, stop) - first])
                position = min(last, stop)
        if position != stop:
            raise UserError(f"checkpoint {self.path} holds {key} only up to row {position} of {stop}")
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def file_table(folder: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files below a folder, by relative name."""
    return {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(files)
    }


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text())


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [path for path in folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, reverse=True)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write safetensors with the permissions of any other new file (the library's own writer leaves 0600)."""
    save_file(tensors, path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
