"""Fill a model whose weights are unread (`weights/unread.py`): each rank reads from files what it keeps, no more."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_moe.models.families import expert_state, full_shape
from ds_moe.models.lora import stored_name
from ds_moe.models.stored_names import sources_of
from ds_moe.moe import ExpertParallel
from ds_moe.weights.files import SafetensorsFiles
from ds_moe.weights.layouts import Rows, stored_rows
from ds_moe.weights.unread import is_unread

BLOCK = 2**24  # bytes read in one piece, if that is a row or more

# Gives a parameter memory; returns the flat part of it that this rank fills, and where that begins in the flattened
# parameter. The part may be longer than what is left of the parameter: ZeRO-3 pads.
Home = Callable[[nn.Parameter], tuple[Tensor, int]]


def read_unread(model: PreTrainedModel, files: SafetensorsFiles, ep: ExpertParallel, home: Home) -> int:
    """Read every unread parameter of a prepared (frozen, adapted, converted) model; the bytes read.

    Beside the parts that `home` allocates, host memory holds a block or two of one tensor and pages of the files, see
    `BLOCK` and `weights/files.py`.

    Args:
        files: they hold every weight in full.
        ep: which experts this rank owns: its experts are the weights' rows from `ep.rank * E / ep.size` on.
        home: where each parameter goes.
    """
    sources = sources_of(model, map(stored_name, model.state_dict()), files.shapes)
    for name, parameter in model.named_parameters():
        if not is_unread(parameter):
            continue
        shape = parameter.shape
        rows = stored_rows(files, sources.get(stored_name(name)), full_shape(name, parameter, ep.size))
        if rows is None:
            raise RuntimeError(f"no file holds {name}")  # load_model left it unread because one did
        flat, start = home(parameter)
        kept = flat[: max(0, shape.numel() - start)]
        flat[kept.numel() :].zero_()
        own = ep.rank * shape.numel() if expert_state(name) else 0
        copy_range(rows, shape[1:].numel(), own + start, kept)
    files.close()
    return files.bytes_read


def stored_value(model: PreTrainedModel, weight: Tensor) -> Tensor:
    """The values of an unread weight of an unprepared model, in full and in its dtype, from the model's own files."""
    files = SafetensorsFiles.find(model.name_or_path)
    assert files is not None  # load_model left the weight there
    sources = sources_of(model, model.state_dict(), files.shapes)
    names = [name for name, one in model.named_parameters(remove_duplicate=False) if one is weight]  # several if tied
    found = filter(None, (stored_rows(files, sources.get(name), weight.shape) for name in names))
    values = next(found)(0, len(weight)).to(weight.dtype)
    files.close()
    return values


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
        if place.numel() == values.numel():  # whole rows need no copy in between, transposed or not
            place.view(values.shape).copy_(values)
        else:
            place.copy_(values.reshape(-1)[begin - first * width : end - first * width])
