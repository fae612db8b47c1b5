"""Chat records: from one record of a data file to a `Sample`.

Three forms are read, as LLaMA-Factory, ms-swift and TRL write them:
- `messages`: [{"role", "content"}], content a string or a list of {"type": "text"} and
  {"type": "image", "image": path} parts;
- `messages` or `conversations` ([{"from", "value"}], ShareGPT) plus an `images` column (or `image`, as LLaVA has it)
  whose entries take the places of `<image>` in string contents, in order, or of {"type": "image"} parts without a path.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ds_moe.data.images import ImageSource, RecordError, image_source, load_image
from ds_moe.errors import shown

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
PLACEHOLDER = "<image>"
PLACE = object()  # stands in a turn's parts for the next entry of `images`
TAKEN_KINDS = ("all", "mean")  # an evaluation's own: of records without a kind, and over all kinds
UNSUPPORTED = ("videos", "video", "audios", "audio", "tools")  # refused rather than silently trained without


@dataclass(frozen=True)
class Turn:
    """One message: its role and its parts in order, text as `str`."""

    role: str  # "system", "user" or "assistant"
    parts: tuple[str | ImageSource, ...]

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Sample:
    """One conversation, ending with an answer.

    `where` is file:line; `kind` is the record's own label, for accuracies per kind.
    """

    turns: tuple[Turn, ...]
    where: str
    kind: str | None = None

    @property
    def images(self) -> list[ImageSource]:
        """All images in the order in which they are read."""
        return [part for turn in self.turns for part in turn.parts if isinstance(part, ImageSource)]

    def first_image(self) -> Image.Image | None:
        """The first image in RGB, as it is stored; None without one."""
        return load_image(self.images[0], max_pixels=sys.maxsize) if self.images else None

    def last_question(self) -> str:
        """Text of the last user turn."""
        return next(turn.text for turn in reversed(self.turns) if turn.role == "user")

    @property
    def answer(self) -> str:
        """Text of the last turn, which is always the assistant's: what an evaluation generates."""
        return self.turns[-1].text


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be trained on: `where` is file:line, `reason` ends with the fix."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def parse_record(record: Any, where: str, root: Path) -> Sample:
    """A record as JSON or Arrow gives it, checked in full except for what only decoding or tokenizing shows.

    `root` is the resolved folder that images must lie below. Raises `RecordError` with the reason and the fix.
    """
    if not isinstance(record, dict):
        raise RecordError(f"a record is {type_of(record)}, not an object (write one {{...}} a line)")
    record = {key: value for key, value in record.items() if value is not None}  # Arrow fills absent fields with null
    for key in UNSUPPORTED:
        if record.get(key):
            raise RecordError(f"{key!r} is not supported (only images and text are; remove the record)")
    turns = [_turn(message, number, root) for number, message in enumerate(_messages(record), start=1)]
    pool = image_pool(record, root)
    places = sum(part is PLACE for turn in turns for part in turn.parts)
    if places != len(pool):
        reason = f"{places} {PLACEHOLDER} placeholders for {len(pool)} images"
        raise RecordError(f"{reason} (write one {PLACEHOLDER} for each entry of 'images')")
    turns = _fill(turns, iter(pool))
    _check_order(turns)
    kind = record.get("kind")
    if kind is not None and not isinstance(kind, str):
        raise RecordError(f"'kind' is {type_of(kind)}, not a string (quote it)")
    if kind in TAKEN_KINDS:
        raise RecordError(f"'kind' is {kind!r}, the name of an evaluation's own row (choose another)")
    answers = [number for number, turn in enumerate(turns, start=1) if turn.role == "assistant"]
    return Sample(turns[: answers[-1]], where, kind)  # what follows the last answer teaches nothing


def _messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages in the form [{"role", "content"}], a top-level `system` text first."""
    keys = [key for key in ("messages", "conversations") if key in record]
    if len(keys) != 1:
        found = "both 'messages' and 'conversations'" if keys else "neither 'messages' nor 'conversations'"
        raise RecordError(f"the record has {found} (write the turns as 'messages')")
    messages = record[keys[0]]
    if not isinstance(messages, list):
        raise RecordError(f"{keys[0]!r} is {type_of(messages)}, not a list (write a list of turns)")
    if not messages:
        raise RecordError(f"{keys[0]!r} is empty (write at least a user and an assistant turn)")
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    return system + [_as_role_and_content(message, number) for number, message in enumerate(messages, start=1)]


def _as_role_and_content(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RecordError(f'message {number} is {type_of(message)}, not an object (write {{"role", "content"}})')
    message = {key: value for key, value in message.items() if value is not None}
    if "from" in message:
        message = {{"from": "role", "value": "content"}.get(key, key): value for key, value in message.items()}
    for key in ("role", "content"):
        if key not in message:
            raise RecordError(f"message {number} has no {key!r} (add it)")
    extra = sorted(set(message) - {"role", "content"})
    if extra:  # a loss switch or a tool call that would be passed over must not look as if it worked
        raise RecordError(f"message {number} has {shown(extra[0])}, which is not read (remove it)")
    return message


def _turn(message: dict[str, Any], number: int, root: Path) -> Turn:
    role = ROLES.get(message["role"]) if isinstance(message["role"], str) else None
    if role is None:
        raise RecordError(f"message {number}: unknown role {shown(message['role'])} (use system, user or assistant)")
    content = message["content"]
    if isinstance(content, str):
        texts = content.split(PLACEHOLDER)
        parts: list[Any] = [part for text in texts for part in (PLACE, text)][1:]
    elif isinstance(content, list):
        parts = [_part(part, number, root) for part in content]
    else:
        raise RecordError(f"message {number}: content is {type_of(content)}, not a string or a list (quote it)")
    parts = _joined(parts)
    if not any(part is PLACE or isinstance(part, ImageSource) or part.strip() for part in parts):
        raise RecordError(f"message {number} ({role}) is empty (give it text, or remove the record)")
    for part in parts:
        if isinstance(part, str):
            _check_text(part, number)
        elif role != "user":
            raise RecordError(f"message {number}: an image in the {role} turn (images belong in user turns)")
    return Turn(role, tuple(parts))


def _joined(parts: list[Any]) -> list[Any]:
    """Neighbouring texts as one, none empty: templates of text-only models take one string a turn."""
    joined: list[Any] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return joined


def _part(part: Any, number: int, root: Path) -> Any:
    """A part of typed content: text, an image, or the place of the next entry of `images`."""
    if not isinstance(part, dict):
        raise RecordError(
            f'message {number}: a content part is {type_of(part)} (write {{"type": "text", "text": ...}})'
        )
    kind, text, image = part.get("type"), part.get("text"), part.get("image")
    if kind == "text":
        if not isinstance(text, str):
            raise RecordError(
                f"message {number}: the 'text' of a text part is {type_of(text)}, not a string (quote it)"
            )
        return text
    if kind == "image":
        return PLACE if image is None else image_source(image, root)
    raise RecordError(f"message {number}: content part of type {shown(kind)} (use 'text' or 'image')")


def image_pool(record: dict[str, Any], root: Path) -> list[ImageSource]:
    values = record.get("images", record.get("image", []))
    if isinstance(values, str | dict):
        values = [values]
    if not isinstance(values, list):
        raise RecordError(f"'images' is {type_of(values)}, not a list of paths (write [\"folder/name.png\"])")
    return [image_source(value, root) for value in values]


def _fill(turns: list[Turn], pool: Iterator[ImageSource]) -> tuple[Turn, ...]:
    return tuple(Turn(turn.role, tuple(next(pool) if part is PLACE else part for part in turn.parts)) for turn in turns)


def _check_order(turns: tuple[Turn, ...]) -> None:
    """What templates pass over in silence: a late system turn, an answer to nothing, nothing to learn."""
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise RecordError("no assistant turn (add the answer to learn)")
    if "system" in roles[1:]:
        raise RecordError("a system turn that is not the first message (move it to the front)")
    if "user" not in roles[: roles.index("assistant")]:
        raise RecordError("an assistant turn before any user turn (start with the question)")


def _check_text(text: str, number: int) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(f"message {number}: text holds a lone surrogate (write valid Unicode)") from error


def type_of(value: object) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number")
