"""A conversation as its chat template writes it: whether all of it is there, and where each answer begins and ends."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ds_moe.data.chat import Turn
from ds_moe.data.images import RecordError
from ds_moe.data.marks import Marks, Message, Rendered, in_order, missing, plain_message
from ds_moe.data.message_keys import Json
from ds_moe.data.processor import Processor
from ds_moe.data.special_tokens import THINK_TAGS, pattern_of, special_ids

Tools = tuple[dict[str, Json], ...]

THE_TEMPLATE = "the model's chat template"


@dataclass(frozen=True)
class Template:
    """What a conversation of one question and one answer shows of a model's template."""

    end: str | None  # the token that ends an answer; None: the template refuses such a conversation
    closing: str  # what stands behind the last answer but the template does not write, up to `end`; mostly nothing
    opened: str  # what a generation prompt writes of the answer itself, such as "<think>\n"
    shows_reasoning: bool  # whether `reasoning_content` is written anywhere


class RenderedConversation:
    """A conversation as its template writes it, and where in it the answers stand."""

    def __init__(self, turns: tuple[Turn, ...], tools: Tools, processor: Processor, content: tuple[str, ...] = ()):
        special = tuple(special_ids(processor))
        guarded = pattern_of(tuple(token for token in special if token not in (*content, *THINK_TAGS)))
        self.turns, self.answers = turns, [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        self._processor, self._content = processor, content
        self._marks = Marks(turns, tools, guarded, pattern_of(special))
        self._marked, self._tools = self._marks.messages(), self._marks.descriptions()
        self.whole = self._marks.read(render(processor, self._marked, self._tools))
        plain = [plain_message(turn) for turn in turns]
        if self.whole.text != render(processor, plain, list(tools)):
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
        self.prompt = render(processor, plain[:last], list(tools), add_generation_prompt=True)
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
            prompt = self._marks.read(render(self._processor, self._marked[:index], self._tools, True))
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
            shown = self._marks.read(render(self._processor, self._marked[: index + 1], self._tools))
            controls = list(self._controls(shown, 0, len(shown.text)))
            self._calls_end = shown.text[slice(*controls[-1])] if controls else None
        return self._calls_end

    def _differs(self, index: int) -> RecordError:
        return RecordError(
            f"{THE_TEMPLATE} renders the turns before answer {self.answers.index(index) + 1} differently on their own "
            "than within the conversation, so training and generation would see other prompts (use another one)"
        )


def render(
    processor: Processor, messages: list[Message], tools: list[dict[str, Json]], add_generation_prompt: bool = False
) -> str:
    """What the template writes of messages. Raises `RecordError` where it refuses them."""
    try:
        return processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, tools=tools or None
        )
    except Exception as error:  # a template is a program, which may fail in any way beside its own refusals
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise RecordError(f"{THE_TEMPLATE} refuses this conversation: {reason}") from error
