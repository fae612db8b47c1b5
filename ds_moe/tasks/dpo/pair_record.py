"""One preference record: a conversation, the answer that is preferred and the one that is not.

These forms are read, which TRL, ms-swift and LLaMA-Factory write:
- a prompt (`prompt`, `messages` or `conversations`) with `chosen` and `rejected` behind it, each a text, a message or a
  list of messages; a `prompt` that is a text is the user's turn;
- `chosen` and `rejected` as whole conversations, whose common beginning is the prompt;
- `messages` with the preferred answer, and `rejected_response` in place of its last answer;
- `messages` and `rejected_messages`, two whole conversations.

Everything else of a record (`images`, `tools`, `system`, `objects`, `kind`) is as `ds_moe.data.chat` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import takewhile
from pathlib import Path

from ds_moe.data.chat import ROLES, Sample, Turn, parse_record, type_of
from ds_moe.data.images import ImageRoot, RecordError
from ds_moe.data.message_keys import WEIGHTS
from ds_moe.data.placeholders import Media
from ds_moe.data.videos import VideoSource

CONTEXT = ("prompt", "messages", "conversations")
REJECTED = ("rejected", "rejected_response", "rejected_messages")
READ = ("chosen", *REJECTED, *CONTEXT)

Messages = list[object]  # as the record writes them; `parse_record` looks into each


@dataclass(frozen=True)
class Pair(Sample):
    """The conversation with the preferred answer, and the same one with the other answer.

    Attributes:
        rejected: alike but for what stands behind the prompt. Turns of the prompt have no weight.
        number: index of the record in its file.
    """

    rejected: Sample | None = None
    number: int = -1

    @property
    def answers(self) -> tuple[str, str]:
        """The texts of the preferred answer and of the other one: all turns behind the prompt."""
        assert self.rejected is not None
        both = zip(self.turns, self.rejected.turns, strict=False)
        common = sum(1 for _ in takewhile(lambda turns: turns[0] == turns[1], both))
        chosen, rejected = ("\n".join(map(_written, one.turns[common:])) for one in (self, self.rejected))
        return chosen, rejected


def _unnamed(media: Media) -> Media:
    """What is read, however the record writes its path."""
    if isinstance(media, VideoSource):
        return replace(media, name="", frames=tuple(replace(frame, name="") for frame in media.frames))
    return replace(media, name="")


def _written(turn: Turn) -> str:
    return turn.written


def parse_pair(record: object, where: str, root: Path | ImageRoot) -> Pair:
    """The pair that a record of JSON or Arrow holds; arguments as for `ds_moe.data.chat.parse_record`.

    Raises:
        RecordError: the record cannot be trained on; the message ends with the fix.
    """
    if not isinstance(record, dict):
        raise RecordError(f"a record is {type_of(record)}, not an object (write one {{...}} a line)")
    given = {key: value for key, value in record.items() if value is not None}
    if given.get("rejected_images"):
        raise RecordError("'rejected_images' is not read: both answers are about the same images (remove it)")
    prompt, chosen, rejected = _parts(given)
    rest = {key: value for key, value in given.items() if key not in (*READ, "rejected_images")}
    both = {"chosen": chosen, "rejected": rejected}
    found = {name: _conversation(name, rest, prompt, answer, where, root) for name, answer in both.items()}
    if found["chosen"].turns == found["rejected"].turns:
        raise RecordError("'chosen' and 'rejected' are identical, so nothing is preferred (remove the record)")
    seen = [list(map(_unnamed, one.media)) for one in found.values()]
    if seen[0] != seen[1]:
        media = " and ".join(f"{name!r} {[each.name for each in one.media] or 'none'}" for name, one in found.items())
        raise RecordError(f"the two conversations hold different images or videos: {media} (give both the same ones)")
    values = {field.name: getattr(found["chosen"], field.name) for field in fields(Sample)}
    return Pair(**values, rejected=found["rejected"])


def _conversation(
    name: str, rest: dict[str, object], prompt: Messages, answer: Messages, where: str, root: Path | ImageRoot
) -> Sample:
    if not answer:
        raise RecordError(f"'{name}' is empty (write the answer)")
    if _role(answer[-1]) not in ("assistant", None):  # None: `parse_record` says what is wrong with it
        raise RecordError(f"{name!r} ends with a {_role(answer[-1])} turn (end it with the answer)")
    messages = [*map(_unlearned, prompt), *answer]
    try:
        return parse_record({**rest, "messages": messages}, where, root)
    except RecordError as error:
        raise RecordError(f"with {name!r} as the answer: {error}") from error


def _unlearned(message: object) -> object:
    """A message of the prompt: answers in it are the same in both conversations, and are not learned."""
    if _role(message) != "assistant" or not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if key not in WEIGHTS} | {"weight": 0}


def _parts(record: dict[str, object]) -> tuple[Messages, Messages, Messages]:
    """(prompt, preferred answer, other answer) of a record, each a list of messages."""
    lost = [key for key in REJECTED if key in record]
    contexts = [key for key in CONTEXT if key in record]
    for names in (lost, contexts):
        if len(names) > 1:
            raise RecordError(f"the record has both {names[0]!r} and {names[1]!r} (keep one of them)")
    if not lost:
        raise RecordError("the record has no 'rejected' (add the answer that is not preferred)")
    key, context = lost[0], record[contexts[0]] if contexts else None
    if "chosen" not in record:
        if key == "rejected" or not isinstance(context, list):
            raise RecordError("the record has no 'chosen' (add the preferred answer)")
        return _of_one_conversation(context, contexts[0], key, record[key])
    chosen, rejected = _messages(record["chosen"], "chosen"), _messages(record[key], key)
    if context is None:
        if not all(isinstance(record[name], list) for name in ("chosen", key)):
            raise RecordError("the record has no 'prompt' (add the question, as a text or as a list of messages)")
        return _of_two_conversations(chosen, rejected, key)
    if isinstance(context, str):
        if chosen and _role(chosen[0]) in ("user", "system"):  # whole conversations, with the question again
            parts = _of_two_conversations(chosen, rejected, key)
            asked = [one for one in parts[0] if isinstance(one, dict)]
            if not any(context in (one.get("content"), one.get("value")) for one in asked):
                raise RecordError("'prompt' is no turn of 'chosen' (remove it, or write the same question)")
            return parts
        return [{"role": "user", "content": context}], chosen, rejected
    if not isinstance(context, list):
        raise RecordError(f"{contexts[0]!r} is {type_of(context)} (write a list of messages)")
    if context and _role(context[-1]) == "assistant":
        fix = "end it with the question; or write 'rejected_response' in place of 'chosen' and 'rejected'"
        raise RecordError(f"{contexts[0]!r} ends with an answer beside 'chosen' ({fix})")
    for name, answer in (("chosen", chosen), (key, rejected)):
        if answer and _role(answer[0]) in ("user", "system"):
            fix = f"leave the prompt out of it, or remove {contexts[0]!r}"
            raise RecordError(f"{name!r} begins with a {_role(answer[0])} turn behind {contexts[0]!r} ({fix})")
    return context, chosen, rejected


def _of_one_conversation(turns: Messages, name: str, key: str, rejected: object) -> tuple[Messages, Messages, Messages]:
    """ms-swift's forms: the turns end with the preferred answer, the other one stands apart."""
    if key == "rejected_messages":
        return _of_two_conversations(turns, _messages(rejected, key), key, chosen_name=name)
    if not turns or _role(turns[-1]) != "assistant":
        raise RecordError(f"{name!r} does not end with an answer beside {key!r} (add the preferred answer)")
    start = len(turns) - 1
    if isinstance(rejected, list):  # takes the place of all that follows the question
        start = max((place + 1 for place, turn in enumerate(turns) if _role(turn) == "user"), default=start)
    return turns[:start], turns[start:], _messages(rejected, key)


def _of_two_conversations(
    chosen: Messages, rejected: Messages, key: str, chosen_name: str = "chosen"
) -> tuple[Messages, Messages, Messages]:
    """Whole conversations: what both begin with is the prompt."""
    both = zip(map(_stripped, chosen), map(_stripped, rejected), strict=False)
    common = sum(1 for _ in takewhile(lambda turns: turns[0] == turns[1], both))
    if common == len(chosen) == len(rejected):
        raise RecordError(f"{chosen_name!r} and {key!r} are identical, so nothing is preferred (remove the record)")
    if common in (len(chosen), len(rejected)):
        shorter = chosen_name if common == len(chosen) else key
        raise RecordError(f"{shorter!r} is only the beginning of the other conversation (add its answer)")
    for name, turns in ((chosen_name, chosen), (key, rejected)):
        if _role(turns[common]) in ("user", "system"):
            fix = "both answers must follow the same prompt"
            raise RecordError(
                f"{chosen_name!r} and {key!r} differ in message {common + 1}, a {_role(turns[common])} "
                f"turn of {name!r} ({fix})"
            )
    return chosen[:common], chosen[common:], rejected[common:]


def _messages(value: object, name: str) -> Messages:
    """An answer or a conversation as a list of messages; a text is the assistant's."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list):
        return value
    raise RecordError(f"{name!r} is {type_of(value)} (write a text, a message or a list of messages)")


def _stripped(message: object) -> object:
    return {key: part for key, part in message.items() if part is not None} if isinstance(message, dict) else message


def _role(message: object) -> str | None:
    """The role of a message in either spelling; None where there is none that is known."""
    if not isinstance(message, dict):
        return None
    role = message.get("role") or message.get("from")
    return ROLES.get(role) if isinstance(role, str) else None
