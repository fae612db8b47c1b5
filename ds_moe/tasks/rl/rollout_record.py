"""One rollout record: a completion that an inference engine sampled, with its log-probs, its routing and its reward.

`ds-moe rollouts` or an orchestrator writes them, one a line (or row). Keys: `tokens` and
`completion_mask`, or `messages` (and `tools`) whose last answer is the completion; `logprobs` of its tokens;
`advantage`, or `reward` and `group`; optionally `routing` (and how to read it), `images`, `reference_logprobs`, `kind`.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

from torch import Tensor

from ds_moe.data.chat import Sample, image_pool, parse_record, type_of
from ds_moe.data.images import ImageRoot, ImageSource, RecordError
from ds_moe.errors import shown
from ds_moe.replay.align import EXTRA_ROW, SHORT, RoutingShape, align
from ds_moe.replay.traces import decode

KEYS = {"tokens", "completion_mask", "messages", "tools", "images", "logprobs", "reference_logprobs", "advantage"}
OF_ROUTING = ("routing_format", "routing_start", "extra_row", "short")  # how to read `routing`, see `align`
KEYS |= {"reward", "group", "routing", *OF_ROUTING, "kind"}
KEYS |= {"completion", "answer", "version", "reward_parts"}  # for people
OF_TURNS = ("messages", "tools", "images", "objects", "literal", "kind")  # what `parse_record` reads
KEYS |= set(OF_TURNS)
UNKNOWN = float("nan")  # a number that the record does not tell
LARGEST = 1e9  # the largest number accepted, of either sign: what is computed from it must be finite in fp32


@dataclass(frozen=True)
class EngineRouting:
    """The experts that an engine says it has used. They are decoded, and checked, when the record is encoded."""

    value: object  # of the form `format`
    format: str  # one of `ds_moe.replay.traces.FORMATS`
    start: int | None  # index of the input token that the first row routes; None: not told
    extra_row: str  # this and the next are arguments of `ds_moe.replay.align.align`
    short: str

    def aligned(self, shape: RoutingShape, completion_S: Tensor) -> Tensor:
        """(tokens up to the end of the completion, L, K): the experts that each of them replays.

        A chat template may write more after the last answer. No engine sees those tokens; like padding they are live.

        Raises:
            UserError: the value is not of its format, or cannot be of this sequence and model.
        """
        first, last = (int(token) for token in completion_S.nonzero()[[0, -1]])
        start = 0 if self.start is None else self.start
        trace = decode(self.value, kind=self.format, layers=shape.layers, top_k=shape.top_k, start=start)
        found, alone = len(trace.ids), last - first  # rows, and those of the completion alone
        # vLLM before 0.22 returned the completion's rows alone for a choice; some clients add one for the last token.
        of_completion = self.format in ("vllm", "vllm_http") and found - alone in (0, 1)
        if self.start is None and found < last and (found == alone == 0 or of_completion):
            trace = replace(trace, start=first)
        return align(trace, shape, last + 1, extra_row=self.extra_row, short=self.short)


@dataclass(frozen=True)
class Rollout:
    """One record, checked as far as that is possible without a model."""

    where: str  # file:line
    kind: str | None
    prompt: Sample | None  # of a record with `messages`: the conversation; None: the record has `tokens`
    tokens: list[int]  # all input ids, image tokens expanded; empty with `prompt`
    mask: list[bool]  # true at the completion's tokens; empty with `prompt`
    images: list[ImageSource]
    logprobs: list[float]  # by the engine, of the completion's tokens
    reference: list[float] | None  # by a reference policy, of the same tokens
    reward: float  # NaN: the record does not tell it
    group: str  # rollouts of one prompt
    advantage: float  # NaN until the rewards of the group are known
    routing: EngineRouting | None


def parse_rollout(record: object, where: str, root: Path | ImageRoot, need_reference: bool = False) -> Rollout:
    """Check a record that JSON or Arrow has given; `where` is its file:line.

    Args:
        root: the folder below which images must be, symlinks resolved.
        need_reference: whether the record must have `reference_logprobs`; if not, they are not kept.

    Raises:
        RecordError: the message says what is wrong and ends with the fix.
    """
    record = _of_known_keys(record)
    prompt = _conversation(record, where, root)
    tokens, mask = _tokens(record) if prompt is None else ([], [])
    images = image_pool(record, root) if prompt is None else prompt.images
    reward, advantage = _number(record, "reward"), _number(record, "advantage")
    if math.isnan(advantage) and (math.isnan(reward) or "group" not in record):
        raise RecordError("the record has no 'advantage', nor 'reward' and 'group' (add them)")
    logprobs = _numbers(record, "logprobs", sum(mask) or None)
    if logprobs is None:
        raise RecordError("the record has no 'logprobs' (add the engine's log-prob of each completion token)")
    reference = _numbers(record, "reference_logprobs", len(logprobs))
    if reference is None and need_reference:
        raise RecordError("the record has no 'reference_logprobs', which rl.kl_weight needs (add them, or set it to 0)")
    return Rollout(
        where=where,
        kind=record.get("kind"),
        prompt=prompt,
        tokens=tokens,
        mask=mask,
        images=images,
        logprobs=logprobs,
        reference=reference if need_reference else None,
        reward=reward,
        group=str(record.get("group", where)),
        advantage=advantage,
        routing=_routing(record),
    )


def _of_known_keys(record: object) -> dict[str, object]:
    if not isinstance(record, dict):
        raise RecordError(f"a record is {type_of(record)}, not an object (write one {{...}} a line)")
    record = {key: value for key, value in record.items() if value is not None}
    unknown = sorted(set(record) - KEYS)
    if unknown:
        raise RecordError(f"{shown(unknown[0])} is not read in a rollout (remove it; known: {', '.join(sorted(KEYS))})")
    if not isinstance(record.get("kind", ""), str):
        raise RecordError(f"'kind' is {type_of(record['kind'])}, not a string (quote it)")
    return record


def _conversation(record: dict[str, object], where: str, root: Path | ImageRoot) -> Sample | None:
    """The conversation of a record with `messages`; None for one with `tokens`."""
    if ("tokens" in record) == ("messages" in record):
        found = "both 'tokens' and" if "tokens" in record else "neither 'tokens' nor"
        raise RecordError(f"the record has {found} 'messages' (write one of them)")
    if "tokens" in record:
        unread = [key for key in ("objects", "literal") if key in record]
        if unread:
            raise RecordError(f"{unread[0]!r} beside 'tokens', in which all is filled in (remove it)")
        return None
    if "completion_mask" in record:
        raise RecordError("'completion_mask' beside 'messages', whose last answer is the completion (remove it)")
    return without_videos(parse_record({key: record[key] for key in OF_TURNS if key in record}, where, root))


def without_videos(sample: Sample) -> Sample:
    """The sample. Raises `RecordError` for one with a video: engines would have to take the same frames of it."""
    if sample.videos:
        raise RecordError("the record has a video, and task rl reads none (remove the record)")
    return sample


def _tokens(record: dict[str, object]) -> tuple[list[int], list[bool]]:
    """All input ids, and which of them are the completion's."""
    tokens, mask = record["tokens"], record.get("completion_mask")
    if not _all(tokens, int) or not tokens or max(map(abs, tokens)) >= 2**31:
        raise RecordError("'tokens' is no list of token ids (write all input ids, image tokens expanded)")
    if not isinstance(mask, list) or any(value not in (0, 1) for value in mask):
        raise RecordError("'completion_mask' is no list of 0 and 1 (write 1 for each token of the completion)")
    if len(mask) != len(tokens):
        raise RecordError(f"'completion_mask' has {len(mask)} entries for {len(tokens)} tokens (write one for each)")
    if not any(mask) or mask[0]:
        text = "starts with the first token" if any(mask) else "is 0 everywhere"
        raise RecordError(f"'completion_mask' {text} (a completion follows a prompt)")
    return tokens, [bool(value) for value in mask]


def _all(values: object, kind: type | tuple[type, ...]) -> TypeGuard[list]:
    """Whether `values` is a list of such numbers. JSON's true and false are no numbers, but Python's are."""
    return isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def _number(record: dict[str, object], key: str) -> float:
    value = record.get(key, UNKNOWN)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError(f"{key!r} is {type_of(value)} (write a number)")
    if key in record and not -LARGEST <= value <= LARGEST:
        raise RecordError(f"{key!r} is {shown(value)} (write a finite number)")
    return float(value)


def _numbers(record: dict[str, object], key: str, count: int | None) -> list[float] | None:
    if key not in record:
        return None
    values = record[key]
    if not _all(values, (int, float)) or not all(-LARGEST <= value <= 1e-3 for value in values):
        raise RecordError(f"{key!r} is no list of log-probs (write finite numbers of at most 0)")
    if count is not None and len(values) != count:
        raise RecordError(f"{key!r} has {len(values)} entries for {count} completion tokens (write one for each)")
    return [float(value) for value in values]


def _routing(record: dict[str, object]) -> EngineRouting | None:
    if "routing" not in record:
        if lone := [key for key in OF_ROUTING if key in record]:
            raise RecordError(f"{lone[0]!r} without 'routing' (add it, or remove the key)")
        return None
    choices = {"extra_row": EXTRA_ROW, "short": SHORT}
    for key, allowed in choices.items():
        if record.get(key, "refuse") not in allowed:
            raise RecordError(f"{key!r} is {shown(record[key])} (write {' or '.join(allowed)})")
    rows = {key: record.get(key, "refuse") for key in choices}
    return EngineRouting(record["routing"], record.get("routing_format", "record"), record.get("routing_start"), **rows)
