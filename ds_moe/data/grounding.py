"""Grounding: the names and boxes of a record's `objects` fill `<ref-object>` and `<bbox>`, as in ms-swift.

`objects` is {"ref": [name, ...], "bbox": [[x, y] or [x1, y1, x2, y2], ...]} and optionally
- `bbox_type`: "real" (pixels of the image as it is shown, the default) or "norm1" (0 to 1);
- `image_id`: for each box the index of its image, from 0; default: all are of the first;
- `width`, `height`: of each image. They are checked, because boxes are of no use if they are wrong.

Names and boxes fill their own placeholders, in the order of the conversation. A box is written as `[x1, y1, x2, y2]`,
which is how Qwen3-VL answers (ms-swift under QWENVL_BBOX_FORMAT=new). All vision families here take coordinates in
thousandths of an image's width and height, so the size that the image is resized to plays no part.
"""

import re
from collections import Counter
from collections.abc import Sequence

from ds_moe.data.images import ImageSource, RecordError, shown_size
from ds_moe.data.placeholders import BOX, REF, or_literal
from ds_moe.errors import shown

PARTS = 1000  # coordinates run from 0 to this
LISTS = {REF: "ref", BOX: "bbox"}
KEYS = ("ref", "bbox", "bbox_type", "image_id", "width", "height")
_PLACE = re.compile("|".join(LISTS))


class Objects:
    """What is left to fill the placeholders of one record.

    Args:
        value: the record's `objects`; None: it has none.
        images: of the conversation, in their order.
        literal: placeholders that stay text.

    Raises:
        RecordError: the message names the key and the entry, and ends with the fix.
    """

    def __init__(self, value: object, images: Sequence[ImageSource], literal: frozenset[str]):
        given = _fields(value)
        self._given = {REF: _names(given), BOX: _boxes(given, images)}
        self._places: Counter[str] = Counter()
        self._literal = literal

    def fill(self, text: str) -> str:
        """The text with the next names and boxes in their places."""
        return _PLACE.sub(self._next, text)

    def _next(self, found: re.Match[str]) -> str:
        name = found[0]
        if name in self._literal:
            return name
        self._places[name] += 1
        given = self._given[name]
        return given[self._places[name] - 1] if self._places[name] <= len(given) else name

    def check_all_used(self) -> None:
        """Raise `RecordError` unless there were as many placeholders as names, and as boxes."""
        for name, key in LISTS.items():
            places, given = self._places[name], len(self._given[name])
            if places != given:
                fix = or_literal(name, f"write one {name} for each entry")
                raise RecordError(f"{places} {name} placeholders for {given} entries of 'objects.{key}' ({fix})")


def _fields(value: object) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecordError(f'\'objects\' is {shown(value)}, not an object (write {{"ref": [...], "bbox": [...]}})')
    unread = sorted(set(value) - set(KEYS))
    if unread:
        raise RecordError(f"'objects' has {shown(unread[0])}, which is not read (remove it; known: {', '.join(KEYS)})")
    return {key: part for key, part in value.items() if part is not None}


def _list(given: dict[str, object], key: str) -> list[object]:
    value = given.get(key, [])
    if not isinstance(value, list):
        raise RecordError(f"'objects.{key}' is {shown(value)}, not a list (write [...])")
    return value


def _names(given: dict[str, object]) -> list[str]:
    names = []
    for number, name in enumerate(_list(given, "ref"), start=1):
        if not isinstance(name, str) or not name.strip():
            raise RecordError(f"entry {number} of 'objects.ref' is {shown(name)}, no name (write a string)")
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise RecordError(f"entry {number} of 'objects.ref' holds a lone surrogate (write valid Unicode)")
        names.append(name)
    return names


def _boxes(given: dict[str, object], images: Sequence[ImageSource]) -> list[str]:
    """The boxes as answers write them."""
    boxes = _list(given, "bbox")
    kind = given.get("bbox_type", "real")
    if kind not in ("real", "norm1"):
        raise RecordError(f'\'objects.bbox_type\' is {shown(kind)} (write "real" for pixels, "norm1" for 0 to 1)')
    if boxes and not images:
        raise RecordError("'objects.bbox' in a record without an image (add the image that the boxes are of)")
    sizes = {index: shown_size(images[index]) for index in set(_image_ids(given, len(boxes), len(images)))}
    _check_sizes(given, images)
    made = []
    for number, (box, index) in enumerate(zip(boxes, _image_ids(given, len(boxes), len(images)), strict=True), start=1):
        width, height = (1, 1) if kind == "norm1" else sizes[index]
        sides = (width, height) * 2  # a point has the first two coordinates alone
        coordinates = [round(x / side * PARTS) for x, side in zip(_corners(box, number), sides, strict=False)]
        if not all(0 <= x <= PARTS for x in coordinates):
            fix = 'cut it to the image, or say "bbox_type"'
            raise RecordError(f"{_entry(number, box)} reaches beyond its image of {width}x{height} ({fix})")
        made.append(str(coordinates))
    return made


def _image_ids(given: dict[str, object], boxes: int, images: int) -> list[int]:
    """Of each box the index of its image."""
    if "image_id" not in given:
        return [0] * boxes
    ids = [index for index in _list(given, "image_id") if isinstance(index, int) and not isinstance(index, bool)]
    if len(ids) != boxes or not all(0 <= index < images for index in ids):
        what = f"{shown(given['image_id'])} for {boxes} boxes and {images} images"
        raise RecordError(f"'objects.image_id' is {what} (write the index of an image, from 0, for each box)")
    return ids


def _check_sizes(given: dict[str, object], images: Sequence[ImageSource]) -> None:
    """Raise `RecordError` where `width` or `height` are not those of the images."""
    for axis, key in enumerate(("width", "height")):
        if key not in given:
            continue
        stored = [shown_size(image)[axis] for image in images]
        if given[key] != stored:
            fix = "remove 'width' and 'height', or scale the boxes to the images"
            raise RecordError(f"'objects.{key}' is {shown(given[key])}, but the images have {stored} ({fix})")


def _entry(number: int, box: object) -> str:
    return f"entry {number} of 'objects.bbox', {shown(box)},"


def _corners(box: object, number: int) -> list[float]:
    """[x, y], or [x1, y1, x2, y2] with the smaller ones first as ms-swift orders them."""
    values = box if isinstance(box, list) else []
    numbers: list[float] = [x for x in values if isinstance(x, int | float) and not isinstance(x, bool)]
    if len(numbers) != len(values) or len(numbers) not in (2, 4):
        raise RecordError(f"{_entry(number, box)} is no point and no box (write [x, y] or [x1, y1, x2, y2])")
    if not all(-1e9 < x < 1e9 for x in numbers):  # NaN is not, either
        raise RecordError(f"{_entry(number, box)} holds a number that is not finite (write finite ones)")
    if len(numbers) == 4:
        (x1, x2), (y1, y2) = sorted(numbers[::2]), sorted(numbers[1::2])
        return [x1, y1, x2, y2]
    return numbers
