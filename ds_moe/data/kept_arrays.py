"""Arrays that a run keeps in a file, so that a later start need not make them anew."""

from pathlib import Path
from tempfile import NamedTemporaryFile
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
    """Write the file whole or not at all, whatever another host writes there. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=file.parent, prefix=f"{file.stem}.", suffix=".partial", delete=False) as stream:
        partial = Path(stream.name)
        try:
            np.savez(stream, **arrays)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    partial.replace(file)
