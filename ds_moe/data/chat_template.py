"""Conversations become token ids, together with the exact spans that the loss is taken on.

The chat template is rendered once for each *shape* of conversation, with a marker in place of every text. That tells
what the template wrote from what a record says: only the template's text may become control tokens (<|im_start|>,
<|image_pad|> ...), text of a record that imitates them stays text, and answers are found by position.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, pairwise
from typing import TYPE_CHECKING

from ds_moe.data.chat import Turn
from ds_moe.data.images import ImageSource, RecordError
from ds_moe.data.processor import Processor
from ds_moe.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Shape = tuple[tuple[str, tuple[bool, ...]], ...]  # of each turn: its role, and for each part whether it is an image

Message = dict[str, str | list[dict[str, str]]]  # role and content, as templates take them


@dataclass(frozen=True)
class Control:
    """A special token written by the template."""

    token: str
    token_id: int
    label: bool  # the loss is taken on it


@dataclass(frozen=True)
class Fixed:
    """Plain text written by the template."""

    text: str
    label: bool


@dataclass(frozen=True)
class Slot:
    """The place of the conversation's `index`-th text part."""

    index: int
    label: bool


@dataclass(frozen=True)
class TurnLayout:
    """What the template writes for a shape; the labels of the last assistant turn begin with item number `answer`."""

    items: tuple[Control | Fixed | Slot, ...]
    answer: int


@dataclass(frozen=True)
class Tokens:
    """Ids of one conversation, and for each whether it has a label; the first `prompt` ids precede the last answer."""

    ids: list[int]
    label: list[bool]
    prompt: int


def tokenize(turns: tuple[Turn, ...], processor: Processor, image_tokens: list[int]) -> Tokens:
    """Ids of a conversation, with labels on every assistant turn and its end token.

    Args:
        image_tokens: the number of ids that each image takes.

    Raises:
        RecordError: the template changes a text of this record, or leaves out an image.
        UserError: the template cannot be trained with at all.
    """
    layout = _layout(processor, _shape(turns))
    texts = [part for turn in turns for part in turn.parts if isinstance(part, str)]
    written = "".join(_text(item, texts) for item in layout.items)
    if written != _render(processor, _messages(turns)):
        raise RecordError("the model's chat template rewrites this record's text (strip spaces and <think> markup)")
    places = sum(isinstance(item, Control) and item.token_id == processor.image_token_id for item in layout.items)
    if places != len(image_tokens):
        raise RecordError(f"the model's chat template shows {places} of the record's {len(image_tokens)} images")
    runs = _runs(layout, texts)
    plain = [run for run, _, _ in runs if isinstance(run, str)]
    encoded = iter(_encode(processor.tokenizer, plain))
    counts = iter(image_tokens)
    ids: list[int] = []
    label: list[bool] = []
    prompt = 0
    for run, labelled, starts_answer in runs:
        if starts_answer:
            prompt = len(ids)
        if isinstance(run, str):
            new = next(encoded)
        else:
            new = [run.token_id] * (next(counts) if run.token_id == processor.image_token_id else 1)
        ids += new
        label += [labelled] * len(new)
    return Tokens(ids, label, prompt)


def end_token(processor: Processor) -> int | None:
    """The token with which the template ends an answer, and which labels teach; None where it writes none."""
    layout = _layout(processor, (("user", (False,)), ("assistant", (False,))))
    last = [item for item in layout.items if item.label][-1]
    return last.token_id if isinstance(last, Control) else None


def _runs(layout: TurnLayout, texts: list[str]) -> list[tuple[str | Control, bool, bool]]:
    """The items as (text or token, labelled, begins the last answer), neighbouring texts joined.

    A tokenizer sees joined texts as one. They stay apart where labels begin or end, because generation too starts from
    the ids of the prompt alone.
    """
    runs: list[tuple[str | Control, bool, bool]] = []
    for index, item in enumerate(layout.items):
        starts = index == layout.answer
        if isinstance(item, Control):
            runs.append((item, item.label, starts))
            continue
        text = _text(item, texts)
        last = runs[-1] if runs else None
        if last and isinstance(last[0], str) and last[1] == item.label and not starts:
            runs[-1] = (last[0] + text, item.label, last[2])
        else:
            runs.append((text, item.label, starts))
    return runs


def _text(item: Control | Fixed | Slot, texts: list[str]) -> str:
    if isinstance(item, Control):
        return item.token
    return item.text if isinstance(item, Fixed) else texts[item.index]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of plain texts, in which no special token is recognised."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []


def _render(processor: Processor, messages: list[Message], add_generation_prompt: bool = False) -> str:
    try:
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program, which may fail in any way beside its own refusals
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise RecordError(f"the model's chat template refuses this conversation: {reason}") from error


def _messages(turns: tuple[Turn, ...]) -> list[Message]:
    return [_message(turn.role, [part if isinstance(part, str) else None for part in turn.parts]) for turn in turns]


def _message(role: str, parts: list[str | None]) -> Message:
    """A message as templates take it. None stands for an image; without images the content is one string."""
    if None not in parts:
        return {"role": role, "content": "".join(part for part in parts if part)}
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def _marker(index: int) -> str:
    """What stands for the text part number `index`, between characters for private use, which no template writes."""
    return f"\ue000{index}\ue001"


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Special tokens and their ids. The longest comes first, because a regex takes the first alternative that fits."""
    special = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(sorted(special.items(), key=lambda item: -len(item[0])))


def _shape(turns: tuple[Turn, ...]) -> Shape:
    return tuple((turn.role, tuple(isinstance(part, ImageSource) for part in turn.parts)) for turn in turns)


@lru_cache(maxsize=4096)
def _layout(processor: Processor, shape: Shape) -> TurnLayout:
    """Render the template with a marker in place of every text, and cut the result into items."""
    markers = count()
    messages = [
        _message(role, [None if is_image else _marker(next(markers)) for is_image in parts]) for role, parts in shape
    ]
    whole = _render(processor, messages)
    controls = _control_ids(processor.tokenizer)
    pattern = re.compile("|".join([_marker(0).replace("0", r"\d+"), *map(re.escape, controls)]))
    spans = _answer_spans(processor, shape, messages, whole, pattern)
    cuts = {0, len(whole), *(start for start, _ in spans)}
    cuts |= {position for match in pattern.finditer(whole) for position in match.span()}
    items: list[Control | Fixed | Slot] = []
    answer = 0
    for start, end in pairwise(sorted(cuts)):
        text, label = whole[start:end], any(first <= start < last for first, last in spans)
        if start == spans[-1][0]:
            answer = len(items)
        if text in controls:
            items.append(Control(text, controls[text], label))
        elif pattern.fullmatch(text):
            items.append(Slot(int(text[1:-1]), label))
        else:
            items.append(Fixed(text, label))
    if [item.index for item in items if isinstance(item, Slot)] != list(range(next(markers))):
        roles = ", ".join(role for role, _ in shape)
        raise UserError(f"model: its chat template drops or moves turns of a conversation of {roles} (use another one)")
    return TurnLayout(tuple(items), answer)


def _answer_spans(
    processor: Processor, shape: Shape, messages: list[Message], whole: str, pattern: re.Pattern[str]
) -> list[tuple[int, int]]:
    """[start, end) in `whole` of every assistant turn, from where generation starts to the end of its end token.

    Raises:
        UserError: the turns before an answer, rendered with a generation prompt, are not how the whole rendering
            begins, so that the model would be trained on other prompts than it is asked with.
    """
    spans = []
    texts = 0
    for index, (role, parts) in enumerate(shape):
        texts += parts.count(False)
        if role != "assistant":
            continue
        prompt = _render(processor, messages[:index], add_generation_prompt=True)
        marker = _marker(texts - 1)
        position = whole.find(marker)
        end = pattern.search(whole, position + len(marker))
        if not whole.startswith(prompt) or position < len(prompt) or end is None:
            raise UserError(
                f"model: its chat template renders the turns before answer {len(spans) + 1} differently on their own "
                "than within the conversation, so training and generation would see other prompts (use another one)"
            )
        spans.append((len(prompt), end.end()))
    return spans
