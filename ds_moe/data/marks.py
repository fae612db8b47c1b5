"""Marks within the texts of a conversation, by which each text is found again in what a chat template has written.

A template may trim texts, take thoughts out of them or write them as JSON, so that they cannot be looked up. The texts
are therefore given marks of characters for private use, and the rendered conversation is read back without them. A mark
stands between words, never before or behind a tag: templates look at how a text begins and ends. Special tokens that a
text imitates are broken up in the same way, so that only the template's own are found.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from ds_moe.data.chat import Turn
from ds_moe.data.images import RecordError
from ds_moe.data.message_keys import Json, mapped
from ds_moe.data.placeholders import Media
from ds_moe.data.videos import VideoSource

TAG = re.compile(r"(</?[\w:.-]+>)")  # <think>, </tool_response> ...
THOUGHT_ENDS = "</think>"
PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))  # characters that Unicode leaves to private use

Message = dict[str, Json]  # as templates take it


@dataclass(frozen=True)
class Mark:
    """Where a mark was put: into which message, and into what of it."""

    message: int  # -1: a tool's description
    what: str  # "text", "thought", "reasoning", "call" or "tool"
    behind: str | None = None  # what follows it in its text, if that is only tags and space; None: more
    media: str = ""  # the first letters of the images and videos that follow that text in the message


@dataclass(frozen=True)
class Rendered:
    """What a template wrote, without marks: the text, where the marks stood, and the special tokens in it."""

    text: str
    at: dict[int, int]  # number of a mark -> its position in the text
    special: list[tuple[int, int]]  # [start, end) of each special token, in order


@dataclass
class Marks:
    """The marks of one conversation; `special` matches the special tokens that its texts must not write."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Json], ...]
    special: re.Pattern[str]
    found: re.Pattern[str]  # special tokens that a template may write, and those that texts may
    marks: list[Mark] = field(default_factory=list)

    def __post_init__(self) -> None:
        everything = {*chain.from_iterable(turn.written for turn in self.turns), *str(self.tools)}
        free = (chr(code) for code in chain(*PRIVATE) if chr(code) not in everything)
        self._opens, self._closes, self._breaks = next(free), next(free), next(free)
        self._back = re.compile(f"{self._opens}(\\d+){self._closes}|{self._breaks}|({self.found.pattern})")

    def messages(self) -> list[Message]:
        """The messages with marks."""
        return [self._message(index, turn) for index, turn in enumerate(self.turns)]

    def descriptions(self) -> list[dict[str, Json]]:
        """The tools, the name of each with a mark."""
        made = []
        for tool in self.tools:
            broken = mapped(tool, self._broken)
            assert isinstance(broken, dict)
            named = broken.get("function", broken)
            assert isinstance(named, dict)
            named["name"] = self._new(Mark(-1, "tool")) + str(named["name"])
            made.append(broken)
        return made

    def read(self, rendered: str) -> Rendered:
        """The text without marks, and where they stood."""
        parts: list[str] = []
        at: dict[int, int] = {}
        special: list[tuple[int, int]] = []
        length = taken = 0
        for match in self._back.finditer(rendered):
            between = rendered[taken : match.start()]
            length, taken = length + len(between), match.end()
            parts.append(between)
            if match[1] is not None:
                at.setdefault(int(match[1]), length)
            elif match[2] is not None:
                special.append((length, length + len(match[2])))
                length += len(match[2])
                parts.append(match[2])
        return Rendered("".join([*parts, rendered[taken:]]), at, special)

    def _message(self, index: int, turn: Turn) -> Message:
        content = list(self._parts(index, turn))
        message = plain_message(turn, content)
        if turn.reasoning is not None:
            message["reasoning_content"] = self._text(index, turn.reasoning, ("reasoning",) * 2, "")
        if turn.calls:
            message["tool_calls"] = [self._call(index, call) for call in turn.calls]
        return {key: mapped(value, self._broken) if key in turn.result else value for key, value in message.items()}

    def _parts(self, index: int, turn: Turn) -> Iterator[str | Media]:
        what = ("thought", "text") if turn.role == "assistant" else ("text", "text")
        for number, part in enumerate(turn.parts):
            if isinstance(part, str):
                media = ""
                for following in turn.parts[number + 1 :]:
                    if isinstance(following, str):
                        break
                    media += kind_of(following)[0]
                yield self._text(index, part, what, media)
            else:
                yield part

    def _call(self, index: int, call: dict[str, Json]) -> Json:
        broken = mapped(call, self._broken)
        assert isinstance(broken, dict) and isinstance(broken["function"], dict)
        broken["function"]["name"] = self._new(Mark(index, "call")) + str(broken["function"]["name"])
        return broken

    def _text(self, index: int, text: str, what: tuple[str, str], media: str) -> str:
        """`text` with marks around each piece between tags; `what` it is up to the end of a thought, and behind it."""
        pieces = TAG.split(text)
        ends = max((number for number, piece in enumerate(pieces) if piece == THOUGHT_ENDS), default=-1)
        filled = [number for number in range(0, len(pieces), 2) if pieces[number].strip()]
        if not filled and text.strip():  # only tags, which templates may look for, but no template could be followed
            pieces, filled = [text], [0]
        made = list(pieces)
        for number in filled:
            piece = pieces[number]
            left, right = piece[: len(piece) - len(piece.lstrip())], piece[len(piece.rstrip()) :]
            kind = what[0] if number < ends else what[1]
            behind = right + "".join(pieces[number + 1 :]) if number == filled[-1] else None
            first, last = self._new(Mark(index, kind)), self._new(Mark(index, kind, behind, media))
            made[number] = f"{left}{first}{self._broken(piece.strip())}{last}{right}"
        return "".join(made)

    def _new(self, mark: Mark) -> str:
        self.marks.append(mark)
        return f"{self._opens}{len(self.marks) - 1}{self._closes}"

    def _broken(self, text: str) -> str:
        """`text` with every special token in it broken up, between all of its characters."""
        return self.special.sub(lambda match: self._breaks.join(match[0]), text)


def plain_message(turn: Turn, parts: list[str | Media] | None = None) -> Message:
    """A message as templates take it, with `parts` in place of its own; without images and videos the content is one
    string."""
    parts = list(turn.parts) if parts is None else parts
    content: Json = "".join(part for part in parts if isinstance(part, str))
    if not all(isinstance(part, str) for part in parts):
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": kind_of(part)} for part in parts
        ]
    message: Message = {"role": turn.role, "content": content}
    if turn.reasoning is not None:
        message["reasoning_content"] = turn.reasoning
    if turn.calls:
        message["tool_calls"] = list(turn.calls)
    return {**message, **turn.result}


def kind_of(part: Media) -> str:
    """What templates call it."""
    return "video" if isinstance(part, VideoSource) else "image"


def missing(rendered: Rendered, marks: Marks) -> Iterator[Mark]:
    """The marks of what a template has left out."""
    for number, mark in enumerate(marks.marks):
        if number not in rendered.at:
            yield mark


def in_order(rendered: Rendered, marks: Marks) -> None:
    """Raise `RecordError` where a template has moved a message other than the system's."""
    reached = 0
    for number, mark in enumerate(marks.marks):
        if mark.message < 0 or marks.turns[mark.message].role == "system" or number not in rendered.at:
            continue
        if rendered.at[number] < reached and mark.message != marks.marks[number - 1].message:
            role = marks.turns[mark.message].role
            raise RecordError(f"the model's chat template moves message {mark.message + 1} ({role}) (use another one)")
        reached = max(reached, rendered.at[number])
