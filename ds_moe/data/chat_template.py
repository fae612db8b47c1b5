"""Conversations become token ids, together with the exact spans that the loss is taken on.

The chat template is rendered three times whatever the number of turns: plainly, with marks in the record's texts (see
`marks.py`), and up to the last answer with a generation prompt. That tells what the template wrote from what a record
says: only the template's text may become control tokens (<|im_start|>, <|image_pad|> ...), text of a record that
imitates them stays text, and answers are found by position.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from ds_moe.config.sections import VideoConfig
from ds_moe.data.chat import Turn
from ds_moe.data.images import RecordError
from ds_moe.data.marks import Marks, Message, Rendered, in_order, missing, plain_message
from ds_moe.data.message_keys import Json
from ds_moe.data.processor import Processor
from ds_moe.data.special_tokens import THINK_TAGS, pattern_of, special_ids
from ds_moe.data.videos import VideoPlan
from ds_moe.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = tuple[dict[str, Json], ...]

THE_TEMPLATE = "the model's chat template"


@dataclass(frozen=True)
class TokenRules:
    """What a run file says about tokens and labels, see `config.sections.DataConfig`."""

    train_on: Literal["last", "all"] = "all"
    content_tokens: tuple[str, ...] = ()
    video: VideoConfig = field(default_factory=VideoConfig)


DEFAULT_RULES = TokenRules()


@dataclass(frozen=True)
class Tokens:
    """Ids of one conversation, and for each whether it has a label; the first `prompt` ids precede the last answer."""

    ids: list[int]
    label: list[bool]
    prompt: int


@dataclass(frozen=True)
class Template:
    """What a conversation of one question and one answer shows of a model's template."""

    end: str | None  # the token that ends an answer; None: the template refuses such a conversation
    closing: str  # what stands behind the last answer but the template does not write, up to `end`; mostly nothing
    opened: str  # what a generation prompt writes of the answer itself, such as "<think>\n"
    shows_reasoning: bool  # whether `reasoning_content` is written anywhere


def tokenize(
    turns: tuple[Turn, ...],
    processor: Processor,
    image_tokens: list[int],
    tools: Tools = (),
    rules: TokenRules = DEFAULT_RULES,
    videos: Sequence[VideoPlan] = (),
) -> Tokens:
    """Ids of a conversation, with labels on what the model writes: thoughts, answers, calls and their end tokens.

    Args:
        image_tokens: the number of ids that each image takes.
        tools: descriptions for the template.
        videos: what is written in place of each video's token.

    Raises:
        RecordError: the template refuses this conversation, leaves something of it out, or writes its beginning
            differently when an answer is to be generated.
        UserError: the template cannot be trained with at all.
    """
    template = _template(processor)
    conversation = _Conversation(turns, tools, processor, rules.content_tokens)
    conversation.check_complete(template)
    conversation.close(template)
    learned = [index for index in conversation.answers if turns[index].weight]
    if rules.train_on == "last":
        learned = [index for index in learned if index == conversation.answers[-1]]
    if not learned:
        raise RecordError("the last answer has the weight 0, and data.train_on is 'last' (remove the record)")
    spans = [conversation.span(index, template) for index in learned]
    whole, prompt = conversation.whole, len(conversation.prompt)
    if videos:
        whole, now = with_frames(whole, videos, processor)
        spans, prompt = [(now(start), now(end)) for start, end in spans], now(prompt)
    video_tokens = [video.tokens for video in videos for _ in video.times]
    return _tokens(whole, spans, prompt, processor, image_tokens, video_tokens)


def end_token(processor: Processor) -> int | None:
    """The token with which the template ends an answer, and which labels teach; None where it writes none."""
    end = _template(processor).end
    return None if end is None else special_ids(processor)[end]


class _Conversation:
    """A conversation as its template writes it, and where in it the answers stand."""

    def __init__(self, turns: tuple[Turn, ...], tools: Tools, processor: Processor, content: tuple[str, ...] = ()):
        special = tuple(special_ids(processor))
        guarded = pattern_of(tuple(token for token in special if token not in (*content, *THINK_TAGS)))
        self.turns, self.answers = turns, [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        self._processor, self._content = processor, content
        self._marks = Marks(turns, tools, guarded, pattern_of(special))
        self._marked, self._tools = self._marks.messages(), self._marks.descriptions()
        self.whole = self._marks.read(_render(processor, self._marked, self._tools))
        plain = [plain_message(turn) for turn in turns]
        if self.whole.text != _render(processor, plain, list(tools)):
            reason = "decides by special tokens or tags in this record's text, which cannot be followed (remove them)"
            raise RecordError(f"{THE_TEMPLATE} {reason}")
        self._of_message: dict[int, list[int]] = {}  # marks that were written
        for number, mark in enumerate(self._marks.marks):
            if number in self.whole.at:
                self._of_message.setdefault(mark.message, []).append(number)
        self._positions = sorted(self.whole.at.values())
        self._tails: dict[tuple[str, str, str], str] = {}
        self._calls_end: str | None = None
        last = self.answers[-1]
        self.prompt = _render(processor, plain[:last], list(tools), add_generation_prompt=True)
        if (anchor := self._anchor(last)) is not None:
            self._tails[anchor[0]] = self.prompt[self.whole.at[anchor[1]] :]

    def check_complete(self, template: Template | None) -> None:
        """Raise `RecordError` where the template leaves out or moves anything but thoughts of earlier answers, or asks
        for the last answer with another text than it writes before it."""
        for mark in missing(self.whole, self._marks):
            earlier = mark.message < self.answers[-1]
            shown = template is not None and template.shows_reasoning
            if earlier and (mark.what == "thought" or (mark.what == "reasoning" and shown)):
                continue
            role = "" if mark.message < 0 else f"message {mark.message + 1} ({self.turns[mark.message].role})"
            names = {"tool": "'tools'", "call": f"the tool calls of {role}", "thought": f"the thought of {role}"}
            names["reasoning"] = f"the 'reasoning_content' of {role}"
            raise RecordError(f"{THE_TEMPLATE} leaves out {names.get(mark.what, role)} (remove it, or use another one)")
        in_order(self.whole, self._marks)
        if self.whole.text.startswith(self.prompt) and len(self.prompt) <= self._first(self.answers[-1]):
            return
        open_thought = template is not None and THINK_TAGS[1] not in template.opened
        closed = self.prompt.removesuffix(template.opened) if template and open_thought else self.prompt
        if closed != self.prompt and self.whole.text.startswith(closed):
            reason = "opens a thought where it asks for an answer, and writes none before this record's last one"
            raise RecordError(f"{THE_TEMPLATE} {reason} (write the thought as <think>...</think> before the answer)")
        raise self._differs(self.answers[-1])

    def close(self, template: Template) -> None:
        """Write behind the last answer what the next turn would begin with, where nothing else ends an answer."""
        last = len(self.turns) - 1
        if template.closing and self.answers[-1] == last and not self.turns[last].calls:  # which end otherwise
            text = self.whole.text + template.closing
            end = (len(text) - len(str(template.end)), len(text))
            self.whole = replace(self.whole, text=text, special=[*self.whole.special, end])

    def span(self, index: int, template: Template) -> tuple[int, int]:
        """[start, end) of an answer: from where its generation starts to the end of its end token."""
        start = len(self.prompt) if index == self.answers[-1] else self._start(index, template.opened)
        return start, self._end(index, template.end)

    def _first(self, index: int) -> int:
        """Where the first text of a message stands, which the message must have."""
        numbers = self._of_message.get(index)
        if not numbers:
            role = self.turns[index].role
            raise RecordError(f"{THE_TEMPLATE} leaves out message {index + 1} ({role}) (remove it)")
        return min(self.whole.at[number] for number in numbers)

    def _anchor(self, index: int) -> tuple[tuple[str, str, str], int] | None:
        """The last mark of the message before `index`, and what decides about the text behind it; None: unknown."""
        numbers = self._of_message.get(index - 1)
        if not numbers:
            return None
        number = max(numbers, key=lambda one: (self.whole.at[one], one))
        mark = self._marks.marks[number]
        if mark.behind is None or self.turns[index - 1].calls:
            return None
        return (self.turns[index - 1].role, mark.behind, mark.media), number

    def _start(self, index: int, opened: str) -> int:
        """Where the generation of an earlier answer starts: behind its prompt, or behind as much of it as is written.

        Prompts of answers that follow a message of the same kind end alike, so that few of them are rendered.
        """
        anchor = self._anchor(index)
        if anchor is not None and anchor[0] in self._tails:
            begins, written = self.whole.at[anchor[1]], self._tails[anchor[0]]
        else:
            prompt = self._marks.read(_render(self._processor, self._marked[:index], self._tools, True))
            begins, written = 0, prompt.text
            if anchor is not None and anchor[1] in prompt.at:
                begins, written = self.whole.at[anchor[1]], prompt.text[prompt.at[anchor[1]] :]
                self._tails[anchor[0]] = written
        for ending in dict.fromkeys((written, written.removesuffix(opened))):
            if self.whole.text.startswith(ending, begins) and begins + len(ending) <= self._first(index):
                return begins + len(ending)
        raise self._differs(index)

    def _end(self, index: int, token: str | None) -> int:
        """Behind the end token of an answer. One that does not end as others do ends with its first control token; one
        that calls tools may have control tokens within, so that its own end token is looked for."""
        last = max(self.whole.at[number] for number in self._of_message[index])
        following = bisect_left(self._positions, last + 1)
        before = self._positions[following] if following < len(self._positions) else len(self.whole.text)
        ends: dict[str, int] = {}  # control token -> where the first one behind the answer's text ends
        for start, end in self._controls(self.whole, last, before):
            ends.setdefault(self.whole.text[start:end], end)
        if token not in ends:
            token = self._end_of_calls(index) if self.turns[index].calls else next(iter(ends), None)
        if token not in ends:
            raise RecordError(f"{THE_TEMPLATE} writes no end token behind message {index + 1} (use another one)")
        return ends[token]

    def _controls(self, rendered: Rendered, first: int, before: int) -> Iterator[tuple[int, int]]:
        """[start, end) of the control tokens that begin in [first, before)."""
        for number in range(bisect_left(rendered.special, (first, first)), len(rendered.special)):
            start, end = rendered.special[number]
            if start >= before:
                return
            if rendered.text[start:end] not in self._content:
                yield start, end

    def _end_of_calls(self, index: int) -> str | None:
        """The last token of a conversation that ends with these calls; all calls of a conversation end alike."""
        if self._calls_end is None:
            shown = self._marks.read(_render(self._processor, self._marked[: index + 1], self._tools))
            controls = list(self._controls(shown, 0, len(shown.text)))
            self._calls_end = shown.text[slice(*controls[-1])] if controls else None
        return self._calls_end

    def _differs(self, index: int) -> RecordError:
        return RecordError(
            f"{THE_TEMPLATE} renders the turns before answer {self.answers.index(index) + 1} differently on their own "
            "than within the conversation, so training and generation would see other prompts (use another one)"
        )


def with_frames(
    whole: Rendered, videos: Sequence[VideoPlan], processor: Processor
) -> tuple[Rendered, Callable[[int], int]]:
    """A text with the frames of videos in place of their tokens, and where in it a position of the old text is.

    Each group of frames is its time and, between the tokens of a vision's start and end, the video's token. Those that
    a template writes around the video's are taken out: transformers 4.57 and vLLM do that, and the models know no
    other prompts, but transformers 5 leaves them in.
    """
    video, start, end = processor.video_tokens
    own = set(whole.special)
    places = [(first, last) for first, last in whole.special if whole.text[first:last] == video]
    if len(places) != len(videos):
        raise RecordError(f"{THE_TEMPLATE} shows {len(places)} of the record's {len(videos)} videos")
    parts: list[str] = []
    special: list[tuple[int, int]] = []
    replaced: list[tuple[int, int]] = []  # of the old text
    moved = [(0, 0)]  # (from where on in the old text, by how much)
    length = taken = 0
    for (first, last), plan in zip(places, videos, strict=True):
        edges = (first - len(start), first), (last, last + len(end))
        if {*edges} <= own and [whole.text[a:b] for a, b in edges] == [start, end]:
            first, last = edges[0][0], edges[1][1]
        replaced.append((first, last))
        parts.append(whole.text[taken:first])
        length += first - taken
        for time in plan.times:
            parts += [time, start, video, end]
            length += len(time)
            for token in (start, video, end):
                special.append((length, length + len(token)))
                length += len(token)
        taken = last
        moved.append((last, length - last))
    starts = [old for old, _ in moved]

    def now(position: int) -> int:
        return position + moved[bisect_right(starts, position) - 1][1]

    for first, last in whole.special:
        if not any(begins <= first < ends for begins, ends in replaced):
            special.append((now(first), now(last)))
    text = "".join([*parts, whole.text[taken:]])
    return Rendered(text, {number: now(at) for number, at in whole.at.items()}, sorted(special)), now


def _tokens(
    whole: Rendered,
    spans: list[tuple[int, int]],
    prompt: int,
    processor: Processor,
    image_tokens: list[int],
    video_tokens: list[int],
) -> Tokens:
    """Ids of a text, cut where special tokens, labels or the last answer begin or end.

    A tokenizer sees the text between two cuts as one. It is cut where labels begin because generation too starts from
    the ids of the prompt alone.
    """
    known, image = special_ids(processor), processor.image_token_id
    special = {start: known[whole.text[start:end]] for start, end in whole.special}
    places = sum(token == image for token in special.values()) if image is not None else 0
    if places != len(image_tokens):
        raise RecordError(f"{THE_TEMPLATE} shows {places} of the record's {len(image_tokens)} images")
    cuts = {0, len(whole.text), prompt}
    for start, end in (*spans, *whole.special):
        cuts |= {start, end}
    pieces = list(pairwise(sorted(cuts)))
    plain = {whole.text[start:end]: None for start, end in pieces if start not in special}  # few differ
    encoded = dict(zip(plain, _encode(processor.tokenizer, list(plain)), strict=True))
    counts, video_counts, left = iter(image_tokens), iter(video_tokens), iter(spans)
    video = known[processor.video_tokens[0]] if video_tokens else None
    ids: list[int] = []
    label: list[bool] = []
    of_prompt = 0
    first, last = next(left)
    for start, end in pieces:
        if start == prompt:
            of_prompt = len(ids)
        if start >= last:
            first, last = next(left, (len(whole.text), len(whole.text)))
        if start in special:
            if special[start] == image:
                new = processor.image_ids(next(counts))
            else:
                new = [special[start]] * (next(video_counts) if special[start] == video else 1)
        else:
            new = encoded[whole.text[start:end]]
        ids += new
        label += [first <= start < last] * len(new)
    return Tokens(ids, label, of_prompt)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of plain texts, in which no special token is recognised."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []


def _render(
    processor: Processor, messages: list[Message], tools: list[dict[str, Json]], add_generation_prompt: bool = False
) -> str:
    try:
        return processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, tools=tools or None
        )
    except Exception as error:  # a template is a program, which may fail in any way beside its own refusals
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise RecordError(f"{THE_TEMPLATE} refuses this conversation: {reason}") from error


@lru_cache(maxsize=64)
def _template(processor: Processor) -> Template:
    """Raises `UserError` for a template that shows not even one question and one answer as it will be asked, be it
    with a thought."""
    question, answer = Turn("user", ("a",)), Turn("assistant", ("b",))
    unknown = Template(None, "", "", False)
    failures: list[RecordError] = []
    for tried in (answer, Turn("assistant", ("<think>\nc\n</think>\n\nb",))):
        try:
            probe = _Conversation((question, tried), (), processor)
            probe.check_complete(None)
            closing = _closing(probe, processor)
            probe.close(replace(unknown, end=closing[1], closing=closing[0]))
            _, ends = probe.span(1, unknown)
        except RecordError as error:
            failures.append(error)
            continue
        end = next(probe.whole.text[start:last] for start, last in probe.whole.special if last == ends)
        return Template(end, closing[0], _opened(processor, question, answer), _shows_reasoning(processor, question))
    if any("refuses this conversation" in str(error) for error in failures):
        return unknown
    raise UserError(str(failures[0]).replace(THE_TEMPLATE, "model: its chat template", 1)) from failures[0]


def _closing(asked: _Conversation, processor: Processor) -> tuple[str, str | None]:
    """(text, its control token) with which the turn after an answer begins, if the template ends answers by nothing
    else and no answer begins with that token: GLM's models stop at <|user|>. ("", None) otherwise."""
    whole, (question, answer) = asked.whole.text, asked.turns
    behind = max(asked.whole.at.values())
    if any(start >= behind for start, _ in asked.whole.special):
        return "", None
    try:
        longer = _Conversation((question, answer, question, answer), (), processor).whole
    except RecordError:
        return "", None
    following = [(start, end) for start, end in longer.special if start >= len(whole)]
    if not longer.text.startswith(whole) or not following:
        return "", None
    token = longer.text[slice(*following[0])]
    prompted = asked.prompt[asked.whole.at[0] :]  # from the question's text on
    return ("", None) if token in prompted else (longer.text[len(whole) : following[0][1]], token)


def _opened(processor: Processor, question: Turn, answer: Turn) -> str:
    """What a generation prompt writes that is not written before the answer of an earlier turn."""
    marks = Marks((question, answer) * 2, (), pattern_of(()), pattern_of(()))
    messages = marks.messages()
    try:
        prompt, whole = _render(processor, messages[:1], [], True), _render(processor, messages, [])
    except RecordError:
        return ""
    return prompt[len(os.path.commonprefix([prompt, whole])) :]


def _shows_reasoning(processor: Processor, question: Turn) -> bool:
    turns = (question, Turn("assistant", ("b",), reasoning="c"))
    marks = Marks(turns, (), pattern_of(()), pattern_of(()))
    try:
        whole = marks.read(_render(processor, marks.messages(), []))
    except RecordError:
        return False
    return not any(mark.what == "reasoning" for mark in missing(whole, marks))
