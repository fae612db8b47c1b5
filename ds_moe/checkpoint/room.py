"""How large a checkpoint will be, and whether a folder can be written and the disk has room for it."""

import math
import shutil
import tempfile
from collections.abc import Container
from pathlib import Path

from torch import nn

from ds_moe.checkpoint.files import step_folders
from ds_moe.checkpoint.fit import persistent_buffers, saved_parameters
from ds_moe.models.families import full_shape

TRAINED_BYTES = 12  # of an element: the fp32 weight and Adam's two moments
MUON_BYTES = 8  # the weight and the momentum


def checkpoint_bytes(
    model: nn.Module,
    ep_size: int,
    with_frozen: bool,
    frozen_width: int | None = None,
    by_muon: Container[str] = (),
) -> int:
    """Bytes of the tensors of one checkpoint, those of all ranks together.

    Args:
        model: of a rank, or an outline without values, with its frozen parts marked.
        ep_size: ranks that its experts are those of one of; 1 for an outline.
        with_frozen: whether parameters that are not trained are saved too.
        frozen_width: bytes of their elements; None: what they have in `model`.
        by_muon: names of the parameters that Muon trains.
    """

    def trained(name: str) -> int:
        return MUON_BYTES if name in by_muon else TRAINED_BYTES

    buffers = sum(buffer.nbytes for _, buffer in persistent_buffers(model))
    return buffers + sum(
        math.prod(full_shape(name, one, ep_size))
        * (trained(name) if one.requires_grad else frozen_width or one.element_size())
        for name, one in saved_parameters(model, with_frozen).items()
    )


def unwritable(folder: Path, key: str) -> str | None:
    """Why nothing could be written below a folder, before anything is loaded for it. `key` is what names the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{key} {folder} cannot be written ({error.strerror}); choose another"


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that a folder, which need not exist yet, lies or will lie on."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def no_room(folder: Path, size: int, what: str = "a checkpoint") -> str | None:
    """Why `what`, of `size` bytes, cannot be written beside what is there; None: it can."""
    if size <= (free := free_bytes(folder)):
        return None
    return f"{folder}: {what} takes {written(size)}, {written(free)} are free; free some, or choose another folder"


def outlook(folder: Path, size: int, keep: int) -> str:
    """What checkpoints will take, for a run that is about to start."""
    text = f"{written(size)} each, {keep} kept beside the one that is written: {written((keep + 1) * size)}"
    return f"{text}; {written(free_bytes(folder))} are free"


def soon_full(folder: Path, size: int, keep: int) -> bool:
    """Whether there is no room for `keep` checkpoints, some of which may be there, and the one that is written."""
    return (keep + 1 - min(keep, len(step_folders(folder)))) * size > free_bytes(folder)


def written(size: float) -> str:
    """Bytes in the unit that disks are sold in."""
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:.3g} {unit}"
    return f"{size / 1000:.3g} TB"
