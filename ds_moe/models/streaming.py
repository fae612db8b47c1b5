"""Fill a model whose weights are unread (`unread.py`) from its files: each rank reads what it keeps, and no more."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ds_moe.models.families import expert_state, full_shape
from ds_moe.models.lora import stored_name
from ds_moe.moe import ExpertParallel
from ds_moe.weights.rows import WeightRows, copy_range
from ds_moe.weights.unread import is_unread

# Gives a parameter memory; returns the flat part of it that this rank fills, and where that begins in the flattened
# parameter. The part may be longer than what is left of the parameter: ZeRO-3 pads.
Home = Callable[[nn.Parameter], tuple[Tensor, int]]


def read_unread(model: nn.Module, files: WeightRows, ep: ExpertParallel, home: Home) -> int:
    """Read every unread parameter of a prepared (frozen, adapted, converted) model; the bytes read.

    Host memory is that of the parts which `home` puts there and a block or two of a tensor (`BLOCK`, `MAPPED`).

    Args:
        files: they hold every weight in full.
        ep: which experts this rank owns: its experts are the weights' rows from `ep.rank * E / ep.size` on.
        home: where each parameter goes.
    """
    for name, parameter in model.named_parameters():
        if not is_unread(parameter):
            continue
        shape = parameter.shape
        rows = files.stored(stored_name(name), full_shape(name, parameter, ep.size))
        if rows is None:
            raise RuntimeError(f"no file holds {name}")  # `load_model` had asked for all
        flat, start = home(parameter)
        kept = flat[: max(0, shape.numel() - start)]
        flat[kept.numel() :].zero_()
        own = ep.rank * shape.numel() if expert_state(name) else 0
        copy_range(rows, shape[1:].numel(), own + start, kept)
    files.close()
    return files.bytes_read
