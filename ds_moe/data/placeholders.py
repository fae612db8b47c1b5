"""Placeholders in the texts of a record. Every one is filled or refused; none is learned as text by mistake.

`<image>` takes the next entry of `images`, `<video>` that of `videos`, `<img>path</img>` is the image at that path
(Qwen-VL's first dialect), and `grounding.py` fills `<ref-object>` and `<bbox>`. What a record names in its list
`literal` stays text.
"""

import re
from enum import Enum
from pathlib import Path

from ds_moe.data.images import ImageRoot, ImageSource, RecordError, image_source
from ds_moe.data.videos import VideoSource
from ds_moe.errors import shown

IMAGE, VIDEO, PATH, REF, BOX = "<image>", "<video>", "<img>", "<ref-object>", "<bbox>"
# Those of ms-swift, LLaMA-Factory, InternLM, and numbered ones such as MMMU's <image 1>.
_NAME = r"<(?:image|img|video|audio|ref-object|bbox|start-image|cot-process|ImageHere)(?:[ _-]?\d{1,4})?>"
_FOUND = re.compile(rf"<img>(?P<path>[^<>\n]+)</img>|{_NAME}")


class MediaPlace(Enum):
    """Stands among the parts of a turn for the next entry of `images`, or of `videos`."""

    IMAGE = IMAGE
    VIDEO = VIDEO


Media = ImageSource | VideoSource
Part = str | Media | MediaPlace


def read_literal(value: object) -> frozenset[str]:
    """The placeholders that a record's `literal` declares to be plain text."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise RecordError(f"'literal' is {shown(value)}, not a list of placeholders (write [\"{BOX}\"])")
    for name in value:
        if not re.fullmatch(_NAME, name):
            raise RecordError(f"'literal' names {shown(name)}, which is no placeholder (remove it)")
    return frozenset(value)


def pieces(text: str, number: int, literal: frozenset[str], root: Path | ImageRoot) -> list[Part]:
    """A text of message `number`, cut where images and videos stand. `<ref-object>` and `<bbox>` are left in it.

    Raises:
        RecordError: an image that cannot be used, or a placeholder that is not read.
    """
    parts: list[Part] = []
    start = 0
    for found in _FOUND.finditer(text):
        name = found[0] if found["path"] is None else PATH
        if name in literal or name in (REF, BOX):
            continue
        parts += [text[start : found.start()], _media(name, found["path"], number, root)]
        start = found.end()
    return [*parts, text[start:]]


def check_no_image(text: str, number: int, literal: frozenset[str]) -> str:
    """`text`, of a thought or a call. Raises `RecordError` for an image or a video in it, or a placeholder that is not
    read."""
    for found in _FOUND.finditer(text):
        name = found[0] if found["path"] is None else PATH
        if name not in {*literal, REF, BOX}:
            raise RecordError(f"message {number}: {name} in a thought or a call ({or_literal(name)})")
    return text


def _media(name: str, path: str | None, number: int, root: Path | ImageRoot) -> Part:
    if path is not None:
        return image_source(path, root)
    if name in (IMAGE, VIDEO):
        return MediaPlace(name)
    what = "has no path and no </img>" if name == PATH else "is not read"
    raise RecordError(f"message {number}: the placeholder {name} {what} ({or_literal(name)})")


def or_literal(name: str, fix: str = "remove it") -> str:
    """A fix, or how the record says that this placeholder is plain text."""
    return f'{fix}; where it is plain text, add "literal": ["{name}"]'
