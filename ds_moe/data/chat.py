"""Chat records: one record of a data file becomes a `Sample`.

Three forms are read, which LLaMA-Factory, ms-swift and TRL write:
- `messages`: [{"role", "content"}], content a string or a list of {"type": "text"} and
  {"type": "image", "image": path} parts, or OpenAI's {"type": "image_url", "image_url": {"url": path}};
- `messages` or `conversations` ([{"from", "value"}], ShareGPT) plus an `images` column (LLaVA: `image`), whose entries
  replace `<image>` in texts, or {"type": "image"} parts without a path, in their order.

Videos are written in the same ways: {"type": "video", "video": path}, with "frames" in place of "video" a list of
images, OpenAI's "video_url", `<video>` and a `videos` column.

Answers may have a thought and tool calls, see `message_keys.py`; the results are messages of the role "tool".
`placeholders.py` and `grounding.py` tell what else is filled in, `record_keys.py` which keys are refused.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from PIL import Image

from ds_moe.data.grounding import Objects
from ds_moe.data.images import ImageRoot, ImageSource, RecordError, image_source, load_image
from ds_moe.data.message_keys import (
    OF_ANSWERS,
    OF_RESULTS,
    WEIGHTS,
    Json,
    check_text,
    mapped,
    read_calls,
    read_reasoning,
    read_result,
    read_tools,
    read_weight,
)
from ds_moe.data.placeholders import Media, MediaPlace, Part, check_no_image, or_literal, pieces, read_literal
from ds_moe.data.record_keys import check_unread_files, part_fields, present
from ds_moe.data.videos import VideoSource, video_source
from ds_moe.errors import shown

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"human": "user", "gpt": "assistant"}
# Names of an evaluation's own rows: the accuracy of records without a kind, and the mean over all kinds.
TAKEN_KINDS = ("all", "mean")


@dataclass(frozen=True)
class Turn:
    """One message: its role, and its texts, images and videos in order.

    Attributes:
        reasoning: the thought before an answer, where it stands apart from the text; None: it does not.
        calls: tool calls of an answer, each {"type", "function": {"name", "arguments"}}.
        result: "name" and "tool_call_id" of a tool's result, as far as it has them.
        weight: whether an answer is learned.
    """

    role: str  # "system", "user", "assistant" or "tool"
    parts: tuple[str | Media, ...]
    reasoning: str | None = None
    calls: tuple[dict[str, Json], ...] = ()
    result: dict[str, str] = field(default_factory=dict)
    weight: bool = True

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def written(self) -> str:
        """All that the message says, in one string: for estimates and searches."""
        calls = json.dumps(self.calls, ensure_ascii=False) if self.calls else ""
        return "\n".join(part for part in (self.reasoning, self.text, calls) if part)


@dataclass(frozen=True)
class Sample:
    """One conversation, which ends with an answer.

    Attributes:
        where: file:line of its record.
        kind: the record's own label; evaluations report an accuracy for each kind.
        tools: descriptions of the tools that answers may call.
        grounded: whether names and boxes of its `objects` are in its texts.
    """

    turns: tuple[Turn, ...]
    where: str
    kind: str | None = None
    tools: tuple[dict[str, Json], ...] = ()
    grounded: bool = False

    @property
    def images(self) -> list[ImageSource]:
        """All images, in the order of the conversation."""
        return [one for one in self.media if isinstance(one, ImageSource)]

    @property
    def videos(self) -> list[VideoSource]:
        """All videos, in the order of the conversation."""
        return [one for one in self.media if isinstance(one, VideoSource)]

    @property
    def media(self) -> list[Media]:
        """All images and videos, in the order of the conversation."""
        return [part for turn in self.turns for part in turn.parts if not isinstance(part, str)]

    def first_image(self) -> Image.Image | None:
        """The first image in RGB, in the size it is stored in; None for a sample without images."""
        return load_image(self.images[0], max_pixels=sys.maxsize) if self.images else None

    def last_question(self) -> str:
        """The text of the last user turn."""
        return next(turn.text for turn in reversed(self.turns) if turn.role == "user")

    @property
    def answer(self) -> str:
        """The text of the last turn, which is always the assistant's, without its thought."""
        return final_answer(self.turns[-1].text)


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be trained on: `where` is its file:line, and `reason` ends with the fix."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def final_answer(text: str) -> str:
    """What stands behind the thought of an answer; all of it where it has none, or one that does not end."""
    return text.rpartition("</think>")[2].strip() if "</think>" in text else text


def parse_record(record: object, where: str, root: Path | ImageRoot) -> Sample:
    """The sample that a record of JSON or Arrow holds. What only decoding or tokenizing can show is not checked here.

    Args:
        where: file:line of the record.
        root: the folder below which images and videos must be, symlinks resolved, or what takes its place.

    Raises:
        RecordError: the record cannot be trained on; the message ends with the fix.
    """
    if not isinstance(record, dict):
        raise RecordError(f"a record is {type_of(record)}, not an object (write one {{...}} a line)")
    record = present(record)
    literal = read_literal(record.get("literal", []))
    written = [_turn(message, number, literal, root) for number, message in enumerate(_messages(record), start=1)]
    tools = read_tools(record["tools"]) if "tools" in record else ()
    pools = {MediaPlace.IMAGE: image_pool(record, root), MediaPlace.VIDEO: video_pool(record, root)}
    turns = _grounded(_fill(written, pools), record.get("objects"), literal)
    media = {type(part) for turn in turns for part in turn.parts}
    check_unread_files(record, images=ImageSource in media, videos=VideoSource in media)
    _check_order(turns)
    kind = record.get("kind")
    if kind is not None and not isinstance(kind, str):
        raise RecordError(f"'kind' is {type_of(kind)}, not a string (quote it)")
    if kind in TAKEN_KINDS:
        raise RecordError(f"'kind' is {kind!r}, the name of an evaluation's own row (choose another)")
    answers = [number for number, turn in enumerate(turns, start=1) if turn.role == "assistant"]
    if not any(turn.weight for turn in turns if turn.role == "assistant"):
        raise RecordError("no answer is learned: all have the weight 0 (remove the record)")
    grounded = bool(record.get("objects"))
    return Sample(turns[: answers[-1]], where, kind, tools, grounded)  # no loss is taken on turns after the last answer


def _messages(record: dict[str, object]) -> list[dict[str, object]]:
    """The messages in the form [{"role", "content"}]; a `system` text of the record becomes the first of them."""
    keys = [key for key in ("messages", "conversations") if key in record]
    if len(keys) != 1:
        found = "both 'messages' and 'conversations'" if keys else "neither 'messages' nor 'conversations'"
        raise RecordError(f"the record has {found} (write the turns as 'messages')")
    messages = record[keys[0]]
    if not isinstance(messages, list):
        raise RecordError(f"{keys[0]!r} is {type_of(messages)}, not a list (write a list of turns)")
    if not messages:
        raise RecordError(f"{keys[0]!r} is empty (write at least a user and an assistant turn)")
    system: list[dict[str, object]] = []
    if record.get("system"):
        system.append({"role": "system", "content": record["system"]})
    return system + [_as_role_and_content(message, number) for number, message in enumerate(messages, start=1)]


def _as_role_and_content(value: object, number: int) -> dict[str, object]:
    if not isinstance(value, dict):
        raise RecordError(f'message {number} is {type_of(value)}, not an object (write {{"role", "content"}})')
    message: dict[str, object] = {key: part for key, part in value.items() if part is not None}
    if "from" in message:
        twice = [pair for pair in (("from", "role"), ("value", "content")) if set(pair) <= set(message)]
        if twice:
            raise RecordError(f"message {number} has both {twice[0][0]!r} and {twice[0][1]!r} (keep one of them)")
        names = {"from": "role", "value": "content"}
        message = {names.get(key, key): value for key, value in message.items()}
    if message.get("tool_calls"):
        message.setdefault("content", "")
    for key in ("role", "content"):
        if key not in message:
            raise RecordError(f"message {number} has no {key!r} (add it)")
    role = ROLES.get(message["role"]) if isinstance(message["role"], str) else None
    read = {"role", "content", *WEIGHTS, *{"assistant": OF_ANSWERS, "tool": OF_RESULTS}.get(str(role), ())}
    extra = sorted(set(message) - read)
    if role is not None and extra:  # ignoring a loss switch or a tool call would look as if it had worked
        raise RecordError(f"message {number} has {shown(extra[0])}, which is not read (remove it)")
    return message


def _turn(
    message: dict[str, object], number: int, literal: frozenset[str], root: Path | ImageRoot
) -> tuple[Turn, list[Part]]:
    """A message without its parts, and these."""
    role = ROLES.get(message["role"]) if isinstance(message["role"], str) else None
    if role is None:
        raise RecordError(
            f"message {number}: unknown role {shown(message['role'])} (use system, user, assistant or tool)"
        )
    content = message["content"]
    if isinstance(content, str):
        parts: list[Part] = [content]
    elif isinstance(content, list):
        parts = [_part(part, number, root) for part in content]
    else:
        raise RecordError(f"message {number}: content is {type_of(content)}, not a string or a list (quote it)")
    cut = [pieces(one, number, literal, root) if isinstance(one, str) else [one] for one in _joined(parts)]
    parts = _joined([piece for one in cut for piece in one])
    calls = read_calls(message, number) if role == "assistant" else ()
    may_be_empty = bool(calls) or role in ("tool", "system")
    if not may_be_empty and not any(not isinstance(part, str) or part.strip() for part in parts):
        raise RecordError(f"message {number} ({role}) is empty (give it text, or remove the record)")
    for part in parts:
        if isinstance(part, str):
            check_text(part, number)
        elif role not in ("user", "tool"):
            video = part is MediaPlace.VIDEO or isinstance(part, VideoSource)
            what, place = ("a video", MediaPlace.VIDEO) if video else ("an image", MediaPlace.IMAGE)
            fix = or_literal(place.value, f"{what.split()[1]}s belong in user turns")
            raise RecordError(f"message {number}: {what} in the {role} turn ({fix})")
    reasoning = read_reasoning(message, number) if role == "assistant" else None
    mapped([reasoning, *calls], lambda text: check_no_image(text, number, literal))
    result = read_result(message, number) if role == "tool" else {}
    return Turn(role, (), reasoning, calls, result, read_weight(message, role, number)), parts


def _joined(parts: list[Part]) -> list[Part]:
    """Join neighbouring texts and drop empty ones: templates of text-only models take one string a turn."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, str) and isinstance(last, str):
            joined[-1] = last + part
        elif part != "":
            joined.append(part)
    return joined


def _part(part: object, number: int, root: Path | ImageRoot) -> Part:
    """One entry of a list of content parts."""
    if not isinstance(part, dict):
        raise RecordError(
            f'message {number}: a content part is {type_of(part)} (write {{"type": "text", "text": ...}})'
        )
    fields = part_fields(part, number)
    if fields["type"] == "image":
        return image_source(fields["image"], root) if "image" in fields else MediaPlace.IMAGE
    if fields["type"] == "video":
        if "fps" in fields and "video" not in fields:
            raise RecordError(f"message {number}: the video part has 'fps' and no frames (write them into the part)")
        return video_source(fields["video"], root, fields.get("fps")) if "video" in fields else MediaPlace.VIDEO
    text = fields.get("text")
    if not isinstance(text, str):
        raise RecordError(f"message {number}: the 'text' of a text part is {type_of(text)}, not a string (quote it)")
    return text


def image_pool(record: dict[str, object], root: Path | ImageRoot) -> list[ImageSource]:
    """The entries of a record's `images`, or its `image`."""
    values = record.get("images", record.get("image", []))
    if isinstance(values, str | dict):
        values = [values]
    if not isinstance(values, list):
        raise RecordError(f"'images' is {type_of(values)}, not a list of paths (write [\"folder/name.png\"])")
    return [image_source(value, root) for value in values]


def video_pool(record: dict[str, object], root: Path | ImageRoot) -> list[VideoSource]:
    """The entries of a record's `videos`, each a file or a list of frames, or its `video`, a file."""
    values = record.get("videos", record.get("video", []))
    if isinstance(values, str | dict):
        values = [values]
    elif not isinstance(values, list) or "video" in record:
        name = "videos" if "videos" in record else "video"
        fix = 'write "videos": ["folder/name.mp4"], or a list of frames in place of a path'
        raise RecordError(f"{name!r} is {type_of(values)}, which does not say what is one video ({fix})")
    return [video_source(value, root) for value in values]


def _fill(written: list[tuple[Turn, list[Part]]], pools: dict[MediaPlace, list[Media]]) -> tuple[Turn, ...]:
    """The turns, with an image or a video of its pool in each place for one."""
    for place, pool in pools.items():
        places = sum(part is place for _, parts in written for part in parts)
        if places != len(pool):
            name = place.value.strip("<>")
            fix = or_literal(place.value, f"write one {place.value} for each entry of '{name}s'")
            raise RecordError(f"{places} {place.value} placeholders for {len(pool)} {name}s ({fix})")
    left = {place: iter(pool) for place, pool in pools.items()}
    return tuple(
        replace(turn, parts=tuple(next(left[part]) if isinstance(part, MediaPlace) else part for part in parts))
        for turn, parts in written
    )


def _grounded(turns: tuple[Turn, ...], value: object, literal: frozenset[str]) -> tuple[Turn, ...]:
    """The turns, with the names and boxes of a record's `objects` in their places: thought, text, calls of each."""
    images = [part for turn in turns for part in turn.parts if isinstance(part, ImageSource)]
    objects = Objects(value, images, literal)
    filled = [
        replace(
            turn,
            reasoning=None if turn.reasoning is None else objects.fill(turn.reasoning),
            parts=tuple(objects.fill(part) if isinstance(part, str) else part for part in turn.parts),
            calls=tuple(mapped(call, objects.fill) for call in turn.calls),
        )
        for turn in turns
    ]
    objects.check_all_used()
    return tuple(filled)


def _check_order(turns: tuple[Turn, ...]) -> None:
    """Refuse what chat templates silently accept: a late system turn, an answer before any question, no answer."""
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise RecordError("no assistant turn (add the answer to learn)")
    if "system" in roles[1:]:
        raise RecordError("a system turn that is not the first message (move it to the front)")
    if "user" not in roles[: roles.index("assistant")]:
        raise RecordError("an assistant turn before any user turn (start with the question)")
    for before, role in pairwise(["no", *roles]):
        if role == "tool" and before not in ("assistant", "tool"):
            raise RecordError(f"a tool turn behind a {before} turn (results follow the answer that asks for them)")


def type_of(value: object) -> str:
    """What JSON calls the type of a value, for messages."""
    names = {type(None): "null", dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number")
