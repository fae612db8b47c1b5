"""What a message says beside its text: whether it is learned, its thought, the tools that it calls or answers for.

Each key is read in the dialects that say the same, and refused by name in any other value: a loss switch or a tool call
that is not understood would look as if it had worked.
"""

import json
import math
from collections.abc import Callable

from ds_moe.data.images import RecordError
from ds_moe.errors import shown

# Whether an answer is learned, as OpenAI (weight: 0 or 1), ms-swift (loss) and axolotl (training, train) write it.
WEIGHTS = ("weight", "loss", "training", "train")
OF_ANSWERS = ("reasoning_content", "tool_calls")
OF_RESULTS = ("name", "tool_call_id")  # of a message of a tool
DEEPEST = 64  # levels of a tool's description or of a call's arguments

Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None


def read_weight(message: dict[str, object], role: str, number: int) -> bool:
    """Whether the message is learned, which is the default for an answer and not possible for any other message."""
    keys = [key for key in WEIGHTS if key in message]
    if not keys:
        return role == "assistant"
    if len(keys) > 1:
        raise RecordError(f"message {number} has {keys[0]!r} and {keys[1]!r} (write one of them)")
    key, value = keys[0], message[keys[0]]
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise RecordError(f"message {number}: {key!r} is {shown(value)} (write 0 or 1; parts of a loss are not read)")
    if value and role != "assistant":
        raise RecordError(f"message {number}: {key!r} is {shown(value)} on a {role} turn (only answers are learned)")
    return bool(value)


def read_reasoning(message: dict[str, object], number: int) -> str | None:
    """The thought before an answer; None where `reasoning_content` is not set."""
    value = message.get("reasoning_content")
    if value is not None and not isinstance(value, str):
        raise RecordError(f"message {number}: 'reasoning_content' is {shown(value)} (write a string)")
    check_text(value or "", number)
    return value


def read_calls(message: dict[str, object], number: int) -> tuple[dict[str, Json], ...]:
    """The tool calls of an answer in OpenAI's form, {"type", "function": {"name", "arguments"}}, arguments an object.

    Arguments may be written as a string of JSON, as OpenAI's API returns them: inference engines read such a string
    before they render the template, and so does this function.
    """
    if "tool_calls" not in message:
        return ()
    calls = _parsed(message["tool_calls"], f"message {number}: 'tool_calls'")
    if not isinstance(calls, list):
        raise RecordError(f"message {number}: 'tool_calls' is {shown(calls)}, not a list (write a list of calls)")
    return tuple(_call(call, f"message {number}: tool call {index}") for index, call in enumerate(calls, start=1))


def _call(value: object, where: str) -> dict[str, Json]:
    form = '{"type": "function", "function": {"name", "arguments"}}'
    if not isinstance(value, dict):
        raise RecordError(f"{where} is {shown(value)}, not an object (write {form})")
    value = {key: part for key, part in value.items() if part is not None}
    function = value.get("function", {key: part for key, part in value.items() if key in ("name", "arguments")})
    if value.get("type", "function") != "function" or not isinstance(function, dict):
        raise RecordError(f"{where} is no call of a function (write {form})")
    known = {"function", "type", "id"} if "function" in value else {"name", "arguments", "type", "id"}
    unread = sorted(set(value) - known) or sorted(set(function) - {"name", "arguments"})
    if unread:
        raise RecordError(f"{where} has {shown(unread[0])}, which is not read (remove it)")
    name, arguments = function.get("name"), _parsed(function.get("arguments", {}), f"{where}: 'arguments'")
    if not isinstance(name, str) or not name.strip():
        raise RecordError(f"{where} has no 'name' (write the function's name)")
    if not isinstance(arguments, dict):
        raise RecordError(f"{where}: 'arguments' is {shown(arguments)} (write an object, or one as a string of JSON)")
    made: dict[str, Json] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if "id" in value:
        made["id"] = _string(value["id"], f"{where}: 'id'")
    return _checked(made, where)


def read_result(message: dict[str, object], number: int) -> dict[str, str]:
    """`name` and `tool_call_id` of a tool's result, as far as it has them."""
    found = {key: _string(message[key], f"message {number}: {key!r}") for key in OF_RESULTS if key in message}
    return _checked(found, f"message {number}")


def read_tools(value: object) -> tuple[dict[str, Json], ...]:
    """The descriptions of a record's `tools`: a list of objects with a name, or the same as a string of JSON."""
    tools = _parsed(value, "'tools'")
    if not isinstance(tools, list):
        raise RecordError(f"'tools' is {shown(tools)}, not a list (write a list of descriptions)")
    for number, tool in enumerate(tools, start=1):
        named = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(named, dict) or not isinstance(named.get("name"), str) or not named["name"].strip():
            raise RecordError(f'tool {number} has no name (write {{"type": "function", "function": {{"name", ...}}}})')
    return tuple(_checked(tool, f"tool {number}") for number, tool in enumerate(tools, start=1))


def check_text(text: str, number: int) -> None:
    """Raise `RecordError` for half of a pair of UTF-16, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(f"message {number}: text holds a lone surrogate (write valid Unicode)") from error


def mapped(value: Json, change: Callable[[str], str]) -> Json:
    """The same value with `change` applied to every string in it, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): mapped(part, change) for key, part in value.items()}
    return [mapped(part, change) for part in value] if isinstance(value, list) else value


def _parsed(value: object, where: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where} is a string that is no JSON: {error} (write JSON)") from error


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where} is {shown(value)}, not a string (quote it)")
    return value


def _checked(value, where: str):
    """`value`. Raises `RecordError` where it is nested too deep or holds what JSON or UTF-8 cannot."""
    level = [value]
    for _ in range(DEEPEST):
        strings = [one for one in level if isinstance(one, str)]
        strings += [key for one in level if isinstance(one, dict) for key in one]
        try:
            "".join(strings).encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError(f"{where}: text holds a lone surrogate (write valid Unicode)") from error
        if any(isinstance(one, float) and not math.isfinite(one) for one in level):
            raise RecordError(f"{where} holds a number that is not finite (write a finite one)")
        level = [part for one in level for part in _parts(one)]
        if not level:
            return value
    raise RecordError(f"{where} is nested more than {DEEPEST} deep (flatten it)")


def _parts(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
