"""What is to be known of a model's chat template: found out by what it writes of a question and an answer."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache

from ds_moe.data.chat import Turn
from ds_moe.data.images import RecordError
from ds_moe.data.marks import Marks, missing
from ds_moe.data.processor import Processor
from ds_moe.data.rendering import THE_TEMPLATE, RenderedConversation, Template, render
from ds_moe.data.special_tokens import pattern_of
from ds_moe.errors import UserError


@lru_cache(maxsize=64)
def template_of(processor: Processor) -> Template:
    """What a processor's template does.

    Raises:
        UserError: it shows not even one question and one answer as it will be asked, be it with a thought.
    """
    question, answer = Turn("user", ("a",)), Turn("assistant", ("b",))
    unknown = Template(None, "", "", False)
    failures: list[RecordError] = []
    for tried in (answer, Turn("assistant", ("<think>\nc\n</think>\n\nb",))):
        try:
            probe = RenderedConversation((question, tried), (), processor)
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


def _closing(asked: RenderedConversation, processor: Processor) -> tuple[str, str | None]:
    """(text, its control token) with which the turn after an answer begins, if the template ends answers by nothing
    else and no answer begins with that token: GLM's models stop at <|user|>. ("", None) otherwise."""
    whole, (question, answer) = asked.whole.text, asked.turns
    behind = max(asked.whole.at.values())
    if any(start >= behind for start, _ in asked.whole.special):
        return "", None
    try:
        longer = RenderedConversation((question, answer, question, answer), (), processor).whole
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
        prompt, whole = render(processor, messages[:1], [], True), render(processor, messages, [])
    except RecordError:
        return ""
    return prompt[len(os.path.commonprefix([prompt, whole])) :]


def _shows_reasoning(processor: Processor, question: Turn) -> bool:
    turns = (question, Turn("assistant", ("b",), reasoning="c"))
    marks = Marks(turns, (), pattern_of(()), pattern_of(()))
    try:
        whole = marks.read(render(processor, marks.messages(), []))
    except RecordError:
        return False
    return not any(mark.what == "reasoning" for mark in missing(whole, marks))
