"""How files store a layer's experts, and how the rows of a weight are read from files of any layout.

In memory transformers keeps the E experts of a layer stacked, gate rows above up rows: `gate_up_proj` (E, 2I, H) and
`down_proj` (E, H, I). Files hold them like that, stacked and transposed, or one tensor an expert and projection.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ds_moe.errors import UserError
from ds_moe.weights.files import SafetensorsFiles

ExpertLayout = Literal["memory", "hub"]  # of stacked experts

LAYOUTS: dict[str, str] = {
    "memory": "as transformers keeps experts in memory: (E, 2I, H) and (E, H, I)",
    "hub": "as the family's checkpoints on the hub store experts, Qwen3-VL-MoE's as (E, H, 2I) and (E, I, H) and most "
    "others' as one tensor an expert",
}


class Joined(NamedTuple):
    """Tensors that lie in a weight one above the other."""

    names: tuple[str, ...]


# What files hold a weight in: the name of a tensor of its size, the names of its parts, or of stacked experts the names
# of one tensor for each expert, in a list for each of the projections that lie in the weight one above the other.
Source = str | Joined | list[list[str]]
SINGLE = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")

Rows = Callable[[int, int], Tensor]  # rows [start, stop) of a weight, in the layout and shape it has in memory


def choose_layout(
    config: PretrainedConfig, layout: ExpertLayout | None, transposed_on_hub: Collection[str]
) -> ExpertLayout:
    """The layout asked for; None: `hub` for a family that has it and where it is unambiguous, else `memory`.

    Raises `UserError` for a layout this model cannot be stored in.

    Args:
        transposed_on_hub: each `model_type` whose checkpoints on the hub store experts transposed.
    """
    problem = hub_layout_problem(config, transposed_on_hub)
    if layout == "hub" and problem is not None:
        raise UserError(f"--layout hub cannot store this model: {problem}; use --layout memory")
    return layout or ("memory" if problem is not None else "hub")


def hub_layout_problem(config: PretrainedConfig, transposed_on_hub: Collection[str]) -> str | None:
    """Why experts cannot be stored transposed, or None where they can."""
    if config.model_type not in transposed_on_hub:
        return f"only {' and '.join(transposed_on_hub)} checkpoints have it, this is {config.model_type}"
    text = config.get_text_config()
    width = text.moe_intermediate_size
    if text.hidden_size not in (width, 2 * width):
        return None
    times = "moe_intermediate_size" if text.hidden_size == width else "twice moe_intermediate_size"
    alike = f"hidden_size {text.hidden_size} is {times}"
    return f"{alike}, so transformers could not tell the transposed experts apart and would load them wrong"


def in_layout(expert: Tensor, layout: ExpertLayout) -> Tensor:
    """A stacked expert weight as `layout` stores it, from how memory keeps it (a view)."""
    return expert.transpose(1, 2) if layout == "hub" else expert


def stored_rows(files: SafetensorsFiles, source: Source | None, shape: torch.Size) -> Rows | None:
    """How to read the rows of a weight, of this shape over all ranks, from files of any layout; None where they do not
    hold it. `source` is of `models/stored_names.py`."""
    if isinstance(source, str):
        name, stored = source, files.shapes[source]
        if stored == shape:
            return lambda start, stop: files.read(name, start, stop)
        if len(shape) == 3 and stored == (shape[0], shape[2], shape[1]):
            return lambda start, stop: files.read(name, start, stop).transpose(1, 2)
        return None
    if isinstance(source, Joined):
        return _joined(files, source, shape)
    if source is None or any(len(experts) != shape[0] for experts in source):
        return None
    return lambda start, stop: torch.stack(
        [torch.cat(list(map(files.read, expert))) for expert in zip(*(one[start:stop] for one in source), strict=True)]
    )


def _joined(files: SafetensorsFiles, source: Joined, shape: torch.Size) -> Rows | None:
    sizes = [files.shapes[name] for name in source.names]
    if [sum(size[0] for size in sizes), *sizes[0][1:]] != list(shape) or len({tuple(size[1:]) for size in sizes}) > 1:
        return None

    def rows(start: int, stop: int) -> Tensor:
        found, first = [], 0
        for name, size in zip(source.names, sizes, strict=True):
            begin, end = max(start, first) - first, min(stop, first + size[0]) - first
            if begin < end:
                found.append(files.read(name, begin, end))
            first += size[0]
        return torch.cat(found)

    return rows


def uneven_experts(files: SafetensorsFiles) -> list[str]:
    """Tensors of single experts that are missing or of another shape than those of the layer's other experts."""
    stacks: dict[str, dict[str, dict[str, tuple[int, ...]]]] = defaultdict(lambda: defaultdict(dict))
    for name, shape in files.shapes.items():
        if found := SINGLE.fullmatch(name):
            experts, expert, projection = found.groups()
            stacks[experts][projection][expert] = shape
    uneven = []
    for experts, projections in stacks.items():
        numbers = set().union(*projections.values())
        for projection, shapes in projections.items():
            usual = Counter(shapes.values()).most_common(1)[0][0]
            uneven += [f"{experts}.{one}.{projection}.weight" for one in numbers if shapes.get(one) != usual]
    return sorted(uneven)
