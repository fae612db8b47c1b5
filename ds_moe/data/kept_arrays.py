"""Arrays that a run keeps in a file, so that a later start need not make them anew."""

import os
from pathlib import Path
from zipfile import BadZipFile

import numpy as np


def read_arrays(file: Path, *names: str) -> list[np.ndarray] | None:
    """Those of these names; None: there is no such file, it lacks one of them, or it is damaged."""
    try:
        with np.load(file, allow_pickle=False) as kept:
            return [kept[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def write_arrays(file: Path, **arrays: np.ndarray) -> None:
    """Write the file whole or not at all. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as stream:
        np.savez(stream, **arrays)
    partial.replace(file)
