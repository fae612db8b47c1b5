"""The files of a checkpoint: what a complete one looks like, and how to read tensors from it. Needs no DeepSpeed.

    <output_dir>/checkpoints/step_00000120/
        rank-00000.safetensors ...  fp32 weights and Adam moments by parameter name; experts as blocks of rows; what
                                    the model's files hold beside the model (weights of multi-token prediction). More
                                    than 4 GiB of a rank are several files: rank-00000-000.safetensors ...
        rng-00000.safetensors ...   this rank's random states
        state.json                  step, data position, topology, Adam's step, versions
        run.yaml, deepspeed.json    the resolved run
        model/                      config, generation config and processor of the model
        manifest.json               every file with size and SHA-256, every tensor with its files; written last

No file is a pickle, which could run code.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ds_moe.errors import UserError, shown
from ds_moe.weights.files import MappedFiles

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
STATE_KEYS = {"step": int, "adam_step": int, "world_size": int, "ep_size": int, "precision": str}
STATE_KEYS |= {"data": dict, "result": dict}
MAPPED = 2**26  # bytes read before files are let go of; a rank's file has thousands of tensors and is slow to open
STEP_FOLDER = re.compile(r"step_(\d{8})")


def newest_complete(folder: Path, note: Callable[[str], None] = print) -> Path | None:
    """The newest complete checkpoint in `folder`. `note` is told of newer ones that are not, with the reason."""
    for path in step_folders(folder):
        problem = incomplete(path)
        if problem is None:
            return path
        note(f"checkpoint {path} is not usable: {problem}; trying the one before it")
    return None


def incomplete(path: Path) -> str | None:
    """Why a checkpoint folder cannot be used, naming the file; None if every file is there and has its size."""
    try:
        manifest = _read_object(path / MANIFEST)
        if manifest["format"] != FORMAT:
            return f"manifest.json has format {shown(manifest['format'])}, this version reads {FORMAT}"
        files = manifest["files"]
        problem = _problem_of_files(path, files) or _problem_of_tensors(manifest["tensors"], files)
        return problem or _problem_of_state(_read_object(path / STATE), files)
    except ValueError as error:
        return str(error)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json is no manifest of a checkpoint ({error})"


def _problem_of_files(path: Path, files: dict[str, Any]) -> str | None:
    """Check presence and size of the files. One outside of the folder is refused: a checkpoint may come from somebody
    else, this program would open the file, and an export would copy it."""
    for name, entry in files.items():
        size, sha256 = entry["size"], entry["sha256"]
        if not (path / name).resolve().is_relative_to(path.resolve()):
            return f"manifest.json names {shown(name)}, which lies outside of the checkpoint"
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes instead of {shown(size)}"
        if not isinstance(sha256, str):
            return f"manifest.json has no SHA-256 of {name}"
    return None if STATE in files else f"manifest.json does not name {STATE}"


def _problem_of_tensors(tensors: dict[str, Any], files: dict[str, Any]) -> str | None:
    for key, pieces in tensors.items():
        for file, start, stop in pieces:
            if file not in files:
                return f"manifest.json places {shown(key)} in {shown(file)}, which is none of its files"
            if not (isinstance(start, int) and isinstance(stop, int) and 0 <= start <= stop):
                return f"manifest.json gives {shown(key)} the rows {shown([start, stop])}"
    return None


def _problem_of_state(state: dict[str, Any], files: dict[str, Any]) -> str | None:
    for key, kind in STATE_KEYS.items():
        value = state.get(key)
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            return f"{STATE}: {key} is {shown(value)}"
    rng = (f"rng-{rank:05d}.safetensors" for rank in range(state["world_size"]))
    lacks = next((name for name in rng if name not in files), None)
    return None if lacks is None else f"manifest.json does not name {lacks}"


def damaged(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """Say which file's content differs from the manifest, or None. Checks every `shares`-th file from `share` on."""
    for name, entry in sorted(read_manifest(path)["files"].items())[share::shares]:
        if sha256_of(path / name) != entry["sha256"]:
            return f"{name} is damaged: its SHA-256 is not the manifest's"
    return None


def find_checkpoint(
    source: Path,
    problem_of: Callable[[Path], str | None] = lambda path: incomplete(path) or damaged(path),
    note: Callable[[str], None] = print,
) -> Path:
    """`source` itself if it is a checkpoint, or the newest complete checkpoint of a run's output folder.

    Raises `UserError` where it is neither, or `problem_of` says what is wrong with the one that was found.
    """
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    found = newest_complete(folder, note) or next(iter(step_folders(folder)), source)
    if (problem := problem_of(found)) is not None:
        raise UserError(f"{found} is no whole checkpoint and no run with one: {problem}")
    return found


class Reader:
    """Reads whole tensors or ranges of their rows from the pieces of a checkpoint, and loads nothing else."""

    def __init__(self, path: Path, manifest: dict[str, Any] | None = None) -> None:
        self.path = path
        self.tensors = (manifest or read_manifest(path))["tensors"]
        self._files = MappedFiles(MAPPED)

    def _piece_shape(self, key: str, name: str, start: int, stop: int) -> list[int]:
        """The shape of `key` in a file, which must have as many rows as the manifest says."""
        try:
            shape = list(self._files.shape(self.path / name, key))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path / name}: {key} cannot be read ({error}); use another checkpoint") from error
        if shape[:1] not in ([], [stop - start]):
            text = f"{key} has the shape {shape}, the manifest counts {stop - start} rows"
            raise UserError(f"{self.path / name}: {text}; use another checkpoint")
        return shape

    def shape(self, key: str) -> list[int]:
        """The shape of the whole tensor."""
        pieces = self.tensors[key]
        shape = self._piece_shape(key, *pieces[0])
        return [max(piece[2] for piece in pieces), *shape[1:]] if shape else shape

    def read(self, key: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read the tensor `kind/name`, or its rows [start, stop). Raises `UserError` where the checkpoint lacks any."""
        pieces = sorted(self.tensors.get(key, []), key=lambda piece: piece[1])
        if not pieces:
            raise UserError(f"checkpoint {self.path} holds no {key}")
        start, stop = rows or (0, pieces[-1][2])
        parts, position = [], start
        for name, first, last in pieces:
            if first <= position < min(last, stop):
                self._piece_shape(key, name, first, last)
                parts.append(self._files.read(self.path / name, key, position - first, min(last, stop) - first))
                position = min(last, stop)
        if position != stop:
            raise UserError(f"checkpoint {self.path} holds {key} only up to row {position} of {stop}")
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def file_table(folder: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files in a folder, by name relative to it."""
    return {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(files)
    }


def _read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `ValueError`, which names the file, for anything else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} {'is no JSON object' if file.is_file() else 'cannot be read (no such file)'}")
    return value


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text())


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_name(step: int) -> str:
    """What the folder of a checkpoint is called; it matches STEP_FOLDER."""
    return f"step_{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [path for path in folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, reverse=True)


def write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
