"""What a record of a data file is, and how it becomes tensors: conversations here, rollouts in `rollouts.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ds_moe.data.chat import Sample, parse_record
from ds_moe.data.encode import Batch, Encoded, collate, encode
from ds_moe.data.images import ImageSource, image_size

PIXELS_A_TOKEN = 32 * 32  # of Qwen3-VL; like the next it only ranks samples by length
CHARACTERS_A_TOKEN = 4


def nothing(parsed: Any) -> None:
    """Keeps nothing of a record."""


def unchanged(records: Any) -> Any:
    """Takes the records as they are."""
    return records


class Form(NamedTuple):
    """One kind of record. Parsed, it has at least `where` and `kind`. Data workers must be able to pickle all of it."""

    parse: Callable[[Any, str, Path], Any]  # record, file:line, resolved data root -> parsed; raises RecordError
    estimate: Callable[[Any, int], int]  # parsed, max_pixels -> tokens, roughly
    encode: Callable[[Any, Any, int, int], Encoded]  # parsed, processor, max_length, max_pixels
    collate: Callable[[list[Encoded], Any], Batch]  # of a micro-batch, processor
    keep: Callable[[Any], Any] = nothing  # what of every record stays in memory, as `kept` of the records
    finish: Callable[[Any], Any] = unchanged  # the records of a file, once all are known


def image_tokens(images: list[ImageSource], max_pixels: int) -> int:
    """Tokens of these images, roughly, from their headers."""
    return sum(width * height for width, height in (image_size(one, max_pixels) for one in images)) // PIXELS_A_TOKEN


def _estimate(sample: Sample, max_pixels: int) -> int:
    characters = sum(len(turn.text) for turn in sample.turns)
    return 4 * len(sample.turns) + characters // CHARACTERS_A_TOKEN + image_tokens(sample.images, max_pixels)


CHAT = Form(parse_record, _estimate, encode, collate)
