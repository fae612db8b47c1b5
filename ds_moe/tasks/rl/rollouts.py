"""Rollouts: completions that an inference engine sampled, with its log-probs, its routing and what they earned.

One record a line (or row), written by `python -m ds_moe.tasks.rl.sample` or by an orchestrator. Its keys:
`tokens` and `completion_mask`, or `messages` whose last answer is the completion; `logprobs` of its tokens;
`advantage`, or `reward` and `group`; optionally `routing`, `images`, `reference_logprobs`, `kind`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_moe.data.chat import Sample, image_pool, parse_record, type_of
from ds_moe.data.encode import Batch, Encoded, check_length, collate, encode, encode_images, padded
from ds_moe.data.images import ImageSource, RecordError
from ds_moe.data.record_kind import CHAT, Form, image_tokens
from ds_moe.errors import UserError, shown
from ds_moe.replay.align import RoutingShape, align
from ds_moe.replay.objective import group_advantages
from ds_moe.replay.traces import decode

KEYS = {"tokens", "completion_mask", "messages", "images", "logprobs", "reference_logprobs", "advantage", "reward"}
KEYS |= {"group", "routing", "routing_format", "routing_start", "kind"}
KEYS |= {"completion", "answer"}  # texts for people
UNKNOWN = float("nan")
LARGEST = 1e9  # of a number, either way: what is computed from it must be finite in fp32


@dataclass(frozen=True)
class Rollout:
    """One record, checked as far as it can be without a model."""

    where: str
    kind: str | None
    prompt: Sample | None  # the form with messages; or
    tokens: list[int]  # all input ids, image tokens expanded
    mask: list[bool]  # of the completion's tokens
    images: list[ImageSource]
    logprobs: list[float]  # of the completion's tokens, by the engine
    reference: list[float] | None  # the same, by a reference policy
    reward: float  # NaN: not told
    group: str
    advantage: float  # NaN until rewards of the group are known
    routing: dict[str, Any] | None  # arguments of `traces.decode`


@dataclass(frozen=True)
class EncodedRollout(Encoded):
    """`labels` are unused."""

    completion: Tensor | None = None  # (S,) bool
    engine: Tensor | None = None  # (S,) fp32, 0 outside the completion
    reference: Tensor | None = None  # (S,) fp32
    routing: Tensor | None = None  # (S, L, K) int16, -1 where the live router decides
    advantage: float = 0.0
    reward: float = UNKNOWN

    @property
    def nbytes(self) -> int:
        extra = (self.completion, self.engine, self.reference, self.routing)
        return super().nbytes + sum(tensor.nbytes for tensor in extra if tensor is not None)


class RolloutRecords:
    """The rollouts of a file (`ds_moe.data.records.Records`), their advantages filled in from the rewards."""

    def __init__(self, records: Any, normalize_std: bool, need_routing: bool = False) -> None:
        """Raises `UserError` if not one record brings the routing that is to be replayed."""
        self._records = records
        self.sha256, self.lengths, self.bad = records.sha256, records.lengths, records.bad
        self.kinds, self.form = records.kinds, records.form
        rewards, groups, given, routed = zip(*records.kept, strict=True)
        if need_routing and not any(routed):
            raise UserError(
                "data.train: not one rollout has a 'routing' to replay (start the engine so that it returns routed "
                "experts, or set moe.replay.enabled to false)"
            )
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        group_B = torch.tensor([numbers[group] for group in groups])
        reward_B, self._advantage_B = (torch.tensor(values, dtype=torch.float64) for values in (rewards, given))
        known_B, missing_B = ~reward_B.isnan(), self._advantage_B.isnan()
        earned_B = torch.zeros_like(reward_B)
        earned_B[known_B] = group_advantages(reward_B[known_B], group_B[known_B], normalize_std)
        self._advantage_B[missing_B] = earned_B[missing_B]

    def __len__(self) -> int:
        return len(self._records)

    def sample(self, index: int) -> Rollout:
        return replace(self._records.sample(index), advantage=float(self._advantage_B[index]))

    def where(self, index: int) -> str:
        return self._records.where(index)


def rollout_form(shape: RoutingShape | None, normalize_std: bool = True, need_reference: bool = False) -> Form:
    """The form of rollout records for a model with this routing; None: a dense one, whose rollouts bring no routing."""
    return Form(
        parse=partial(parse_rollout, shape=shape, need_reference=need_reference),
        estimate=_estimate,
        encode=partial(encode_rollout, shape=shape),
        collate=partial(collate_rollouts, shape=shape, need_reference=need_reference),
        keep=_of_the_group,
        finish=partial(RolloutRecords, normalize_std=normalize_std, need_routing=shape is not None),
    )


def parse_rollout(
    record: Any, where: str, root: Path, shape: RoutingShape | None = None, need_reference: bool = False
) -> Rollout:
    """Raises `RecordError` with the reason and the fix."""
    if not isinstance(record, dict):
        raise RecordError(f"a record is {type_of(record)}, not an object (write one {{...}} a line)")
    record = {key: value for key, value in record.items() if value is not None}
    unknown = sorted(set(record) - KEYS)
    if unknown:
        raise RecordError(f"{shown(unknown[0])} is not read in a rollout (remove it; known: {', '.join(sorted(KEYS))})")
    kind = record.get("kind")
    if kind is not None and not isinstance(kind, str):
        raise RecordError(f"'kind' is {type_of(kind)}, not a string (quote it)")
    if ("tokens" in record) == ("messages" in record):
        found = "both 'tokens' and" if "tokens" in record else "neither 'tokens' nor"
        raise RecordError(f"the record has {found} 'messages' (write one of them)")
    prompt, tokens, mask, images = None, [], [], []
    if "messages" in record:
        if "completion_mask" in record:
            raise RecordError("'completion_mask' beside 'messages', whose last answer is the completion (remove it)")
        chat = {key: record[key] for key in ("messages", "images", "kind") if key in record}
        prompt = parse_record(chat, where, root)
        images = prompt.images
    else:
        tokens, mask = _tokens(record)
        images = image_pool(record, root)
    reward = _number(record, "reward")
    advantage = _number(record, "advantage")
    if math.isnan(advantage) and (math.isnan(reward) or "group" not in record):
        raise RecordError("the record has no 'advantage', nor 'reward' and 'group' (add them)")
    logprobs = _numbers(record, "logprobs", sum(mask) or None)
    if logprobs is None:
        raise RecordError("the record has no 'logprobs' (add the engine's log-prob of each completion token)")
    reference = _numbers(record, "reference_logprobs", len(logprobs))
    if reference is None and need_reference:
        raise RecordError("the record has no 'reference_logprobs', which rl.kl_weight needs (add them, or set it to 0)")
    if not need_reference:
        reference = None
    group = str(record.get("group", where))
    routing = _routing(record, shape)
    return Rollout(where, kind, prompt, tokens, mask, images, logprobs, reference, reward, group, advantage, routing)


def encode_rollout(
    rollout: Rollout, processor: Any, max_length: int, max_pixels: int, shape: RoutingShape | None = None
) -> EncodedRollout:
    """Tokens, images and an aligned routing. Raises `RecordError` for what does not fit together or the model."""
    if rollout.prompt is not None:
        encoded = encode(rollout.prompt, processor, max_length, max_pixels)
        completion = (encoded.labels != -100) & (torch.arange(len(encoded.labels)) >= encoded.prompt)
    else:
        encoded = _encode_tokens(rollout, processor, max_length, max_pixels)
        completion = torch.tensor(rollout.mask)
    if int(completion.sum()) != len(rollout.logprobs):
        reason = f"{len(rollout.logprobs)} 'logprobs' for {int(completion.sum())} completion tokens"
        raise RecordError(f"{reason} (write one for each, the end token included)")
    routing = None
    if rollout.routing is not None and shape is not None:
        try:
            trace = decode(rollout.routing["value"], **rollout.routing["arguments"])
            # Templates write on behind the last answer, which no engine sees: those tokens are live, like padding.
            seen = int(completion.nonzero()[-1]) + 1
            routing = align(trace, shape, seen)
        except UserError as error:
            raise RecordError(str(error)) from error
    plain = {field.name: getattr(encoded, field.name) for field in fields(Encoded)}
    return EncodedRollout(
        **{**plain, "kind": rollout.kind},
        completion=completion,
        engine=_spread(rollout.logprobs, completion),
        reference=None if rollout.reference is None else _spread(rollout.reference, completion),
        routing=routing,
        advantage=rollout.advantage,
        reward=rollout.reward,
    )


def collate_rollouts(
    encoded: list[Encoded], processor: Any, shape: RoutingShape | None = None, need_reference: bool = False
) -> Batch:
    """A padded micro-batch without labels; beside what the model takes: completion_mask (B, S) bool, engine_logprobs
    (B, S), advantage and reward (B,), if needed reference_logprobs (B, S), and for a model with experts
    routing (B, S, L, K). A filler completes nothing."""
    batch = collate(encoded, processor)
    length = batch["input_ids"].shape[1]
    del batch["labels"]

    def stacked(name: str, default: Any) -> Tensor:
        values = (getattr(one, name, None) for one in encoded)
        rows = [torch.tensor([default]) if value is None else value for value in values]
        return torch.stack([padded(row, length, default, "right") for row in rows])

    batch["completion_mask"] = stacked("completion", False)
    batch["engine_logprobs"] = stacked("engine", 0.0)
    for name, missing in (("advantage", 0.0), ("reward", UNKNOWN)):
        batch[name] = torch.tensor([getattr(one, name, missing) for one in encoded], dtype=torch.float32)
    if need_reference:
        batch["reference_logprobs"] = stacked("reference", 0.0)
    if shape is not None:
        routing = torch.full((len(encoded), length, len(shape.moe_layers), shape.top_k), -1, dtype=torch.int16)
        for row, one in zip(routing, encoded, strict=True):
            if isinstance(one, EncodedRollout) and one.routing is not None:
                row[: len(one.routing)] = one.routing
        batch["routing"] = routing
    return batch


def _of_the_group(rollout: Rollout) -> tuple[float, str, float, bool]:
    return rollout.reward, rollout.group, rollout.advantage, rollout.routing is not None


def _estimate(rollout: Rollout, max_pixels: int) -> int:
    if rollout.prompt is not None:
        return CHAT.estimate(rollout.prompt, max_pixels)
    image_tokens(rollout.images, max_pixels)  # their headers must be readable; `tokens` counts them already
    return len(rollout.tokens)


def _tokens(record: dict[str, Any]) -> tuple[list[int], list[bool]]:
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


def _all(values: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def _number(record: dict[str, Any], key: str) -> float:
    value = record.get(key, UNKNOWN)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError(f"{key!r} is {type_of(value)} (write a number)")
    if key in record and not -LARGEST <= value <= LARGEST:
        raise RecordError(f"{key!r} is {shown(value)} (write a finite number)")
    return float(value)


def _numbers(record: dict[str, Any], key: str, count: int | None) -> list[float] | None:
    if key not in record:
        return None
    values = record[key]
    if not _all(values, (int, float)) or not all(-LARGEST <= value <= 1e-3 for value in values):
        raise RecordError(f"{key!r} is no list of log-probs (write finite numbers of at most 0)")
    if count is not None and len(values) != count:
        raise RecordError(f"{key!r} has {len(values)} entries for {count} completion tokens (write one for each)")
    return [float(value) for value in values]


def _routing(record: dict[str, Any], shape: RoutingShape | None) -> dict[str, Any] | None:
    """What `traces.decode` needs, kept undecoded: it is read when the record is used."""
    if "routing" not in record:
        lone = [key for key in ("routing_format", "routing_start") if key in record]
        if lone:
            raise RecordError(f"{lone[0]!r} without 'routing' (add it, or remove the key)")
        return None
    arguments: dict[str, Any] = {"kind": record.get("routing_format", "record")}
    if "routing_start" in record:
        arguments["start"] = record["routing_start"]
    if shape is not None:
        arguments |= {"layers": shape.layers, "top_k": shape.top_k}
    return {"value": record["routing"], "arguments": arguments}


def _encode_tokens(rollout: Rollout, processor: Any, max_length: int, max_pixels: int) -> Encoded:
    pixels, grid, of_images = encode_images(rollout.images, processor, max_pixels)
    check_length(len(rollout.tokens), sum(of_images), max_length)
    input_ids = torch.tensor(rollout.tokens)
    vocabulary = len(processor.tokenizer)
    if int(input_ids.min()) < 0 or int(input_ids.max()) >= vocabulary:
        raise RecordError(f"'tokens' holds an id outside of the model's {vocabulary} (use the model's own tokenizer)")
    places = int((input_ids == processor.image_token_id).sum()) if processor.image_processor is not None else 0
    if places != sum(of_images):
        reason = f"'tokens' holds {places} image tokens, its {len(of_images)} images make {sum(of_images)}"
        raise RecordError(f"{reason} (write the ids the engine saw, and all of their images in order)")
    return Encoded(input_ids, torch.full_like(input_ids, -100), rollout.mask.index(True), pixels, grid)


def _spread(values: list[float], mask_S: Tensor) -> Tensor:
    return torch.zeros(len(mask_S)).masked_scatter(mask_S, torch.tensor(values))
