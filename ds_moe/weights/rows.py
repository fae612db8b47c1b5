"""The tensors of a safetensors checkpoint, read a few rows at a time from one file at a time."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from ds_moe.errors import UserError
from ds_moe.weights.files import shard_names

BLOCK = 2**24  # bytes read in one piece, if that is a row or more
MAPPED = 2**24  # bytes after which a file is opened anew: pages of a file that were touched count as memory till then

Rows = Callable[[int, int], Tensor]  # rows [start, stop) of a weight, in the layout and shape it has in memory

# One tensor an expert, as Qwen3-MoE's files have them: the parts that are stacked, and which of them lie in one.
SINGLE = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class WeightRows:
    """Names, shapes and rows of what `files` hold; several ranks may read them at once.

    Attributes:
        shapes: of every tensor, by name.
        bytes_read: handed out so far.

    Raises:
        UserError: a file that is missing, cut short or no safetensors; `path` is what the run calls them.
    """

    def __init__(self, path: str, files: list[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.bytes_read = 0
        self._place: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        self._mapped = 0
        for file in files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():
                        self.shapes[name] = tuple(tensors.get_slice(name).get_shape())
                        self._place[name] = file
            except (OSError, SafetensorError) as error:
                raise UserError(f"model.path {path!r}: {file.name} cannot be read: {error}") from error

    @classmethod
    def find(cls, path: str) -> WeightRows | None:
        """Those of a folder or hub id (downloaded first); None where the weights are in another format."""
        optional = {"_raise_exceptions_for_missing_entries": False}
        if single := cached_file(path, SAFE_WEIGHTS_NAME, **optional):
            return cls(path, [Path(single)])
        if index := cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **optional):
            shard_names(Path(index))  # none lies elsewhere
            files, _ = get_checkpoint_shard_files(path, index)
            return cls(path, [Path(file) for file in files or []])
        return None

    def uneven_experts(self) -> list[str]:
        """Tensors of single experts that are missing or of another shape than those of the layer's other experts."""
        stacks: dict[str, dict[str, dict[str, tuple[int, ...]]]] = defaultdict(lambda: defaultdict(dict))
        for name, shape in self.shapes.items():
            if found := SINGLE.fullmatch(name):
                experts, expert, part = found.groups()
                stacks[experts][part][expert] = shape
        uneven = []
        for experts, parts in stacks.items():
            numbers = set().union(*parts.values())
            for part, shapes in parts.items():
                usual = Counter(shapes.values()).most_common(1)[0][0]
                uneven += [f"{experts}.{one}.{part}.weight" for one in numbers if shapes.get(one) != usual]
        return sorted(uneven)

    def stored(self, name: str, shape: torch.Size) -> Rows | None:
        """How to read the rows of a weight that has `shape` in memory, over all ranks; None where no file has it.

        Experts may be stacked as in memory, stacked and transposed (the hub's layout), or one tensor each.
        """
        if self.shapes.get(name) == shape:
            return lambda start, stop: self._rows(name, start, stop)
        if len(shape) == 3 and self.shapes.get(name) == (shape[0], shape[2], shape[1]):
            return lambda start, stop: self._rows(name, start, stop).transpose(1, 2)
        experts, _, part = name.rpartition(".")
        names = [[f"{experts}.{expert}.{one}.weight" for one in PARTS.get(part, ())] for expert in range(shape[0])]
        if part not in PARTS or any(one not in self.shapes for expert in names for one in expert):
            return None

        def unstacked(start: int, stop: int) -> Tensor:
            return torch.stack([torch.cat([self._rows(one) for one in expert]) for expert in names[start:stop]])

        return unstacked

    def _rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A view of the file's pages: none is read before it is touched, and all stay as long as the view does."""
        file = self._place[name]
        if self._open is None or self._open[0] != file or self._mapped > MAPPED:
            self._open, self._mapped = (file, safe_open(file, framework="pt")), 0
        rows = self._open[1].get_slice(name)[start:stop]
        self.bytes_read += rows.nbytes
        self._mapped += rows.nbytes
        return rows

    def close(self) -> None:
        """Give the pages back; reading opens the files again."""
        self._open = None


@torch.no_grad()
def copy_range(rows: Rows, width: int, start: int, into: Tensor) -> None:
    """Fill the flat `into` with the elements [start, start + its size) of a flattened weight, whose rows have `width`
    elements each; in the dtype and on the device of `into`."""
    stop = start + into.numel()
    step = max(1, BLOCK // (width * into.element_size()))  # rows
    for first in range(start // width, -(-stop // width), step):
        last = min(first + step, -(-stop // width))
        begin, end = max(start, first * width), min(stop, last * width)
        values, place = rows(first, last), into[begin - start : end - start]
        if place.numel() == values.numel():  # no copy on the way, transposed or not
            place.view(values.shape).copy_(values)
        else:
            place.copy_(values.reshape(-1)[begin - first * width : end - first * width])
