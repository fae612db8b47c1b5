"""Conversations become token ids, together with the exact spans that the loss is taken on.

The chat template is rendered three times whatever the number of turns: plainly, with marks in the record's texts (see
`marks.py`), and up to the last answer with a generation prompt. That tells what the template wrote from what a record
says: only the template's text may become control tokens (<|im_start|>, <|image_pad|> ...), text of a record that
imitates them stays text, and answers are found by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from ds_moe.config.sections import VideoConfig
from ds_moe.data.chat import Turn
from ds_moe.data.images import RecordError
from ds_moe.data.marks import Rendered
from ds_moe.data.processor import Processor
from ds_moe.data.rendering import THE_TEMPLATE, RenderedConversation, Tools
from ds_moe.data.special_tokens import special_ids
from ds_moe.data.template_probe import template_of
from ds_moe.data.video_text import with_frames
from ds_moe.data.videos import VideoPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def tokenize(
    turns: tuple[Turn, ...],
    processor: Processor,
    image_ids: list[list[int]],
    tools: Tools = (),
    rules: TokenRules = DEFAULT_RULES,
    videos: Sequence[VideoPlan] = (),
) -> Tokens:
    """Ids of a conversation, with labels on what the model writes: thoughts, answers, calls and their end tokens.

    Args:
        image_ids: what stands for each image.
        tools: descriptions for the template.
        videos: what is written in place of each video's token.

    Raises:
        RecordError: the template refuses this conversation, leaves something of it out, or writes its beginning
            differently when an answer is to be generated.
        UserError: the template cannot be trained with at all.
    """
    template = template_of(processor)
    conversation = RenderedConversation(turns, tools, processor, rules.content_tokens)
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
    return _tokens(whole, spans, prompt, processor, image_ids, video_tokens)


def end_token(processor: Processor) -> int | None:
    """The token with which the template ends an answer, and which labels teach; None where it writes none."""
    end = template_of(processor).end
    return None if end is None else special_ids(processor)[end]


def _tokens(
    whole: Rendered,
    spans: list[tuple[int, int]],
    prompt: int,
    processor: Processor,
    image_ids: list[list[int]],
    video_tokens: list[int],
) -> Tokens:
    """Ids of a text, cut where special tokens, labels or the last answer begin or end.

    A tokenizer sees the text between two cuts as one. It is cut where labels begin because generation too starts from
    the ids of the prompt alone.
    """
    known, image = special_ids(processor), processor.image_token_id
    special = {start: known[whole.text[start:end]] for start, end in whole.special}
    places = sum(token == image for token in special.values()) if image is not None else 0
    if places != len(image_ids):
        raise RecordError(f"{THE_TEMPLATE} shows {places} of the record's {len(image_ids)} images")
    cuts = {0, len(whole.text), prompt}
    for start, end in (*spans, *whole.special):
        cuts |= {start, end}
    pieces = list(pairwise(sorted(cuts)))
    plain = {whole.text[start:end]: None for start, end in pieces if start not in special}  # few differ
    encoded = dict(zip(plain, _encode(processor.tokenizer, list(plain)), strict=True))
    of_images, video_counts, left = iter(image_ids), iter(video_tokens), iter(spans)
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
                new = next(of_images)
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
