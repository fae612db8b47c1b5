"""Rollouts as a kind of record: how they become tensors, and the advantages that rewards of a group give them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ds_moe.data.batch import NO_LOSS, Batch
from ds_moe.data.chat_template import DEFAULT_RULES, TokenRules
from ds_moe.data.encode import (
    Encoded,
    Pixels,
    check_length,
    collate,
    encode,
    encode_images,
    lay_out,
    seen,
    tokens_of_images,
)
from ds_moe.data.images import ImageRoot, RecordError
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import CHAT, RecordKind, Records, image_tokens
from ds_moe.errors import UserError
from ds_moe.replay.align import LIVE, RoutingShape
from ds_moe.replay.objective import group_advantages
from ds_moe.tasks.rl.rollout_record import UNKNOWN, Rollout, parse_rollout


class Outcome(NamedTuple):
    """What is kept in memory of every rollout, to compute the advantages of its group."""

    reward: float  # NaN: the record does not tell it
    group: str
    advantage: float  # NaN: it follows from the rewards of the group
    routed: bool  # whether the record has a routing


@dataclass(frozen=True)
class EncodedRollout(Encoded):
    """The tensors of one rollout, unpadded; the completion's tokens are its `labels`."""

    completion: Tensor | None = None  # (S,) bool, true at the completion's tokens
    engine: Tensor | None = None  # (S,) fp32 log-probs, 0 outside the completion
    reference: Tensor | None = None  # (S,) fp32 log-probs, 0 outside the completion
    routing: Tensor | None = None  # (tokens up to the completion's end, L, K) int16, LIVE where the router decides
    advantage: float = 0.0
    reward: float = UNKNOWN

    @property
    def nbytes(self) -> int:
        extra = (self.completion, self.engine, self.reference, self.routing)
        return super().nbytes + sum(tensor.nbytes for tensor in extra if tensor is not None)


@dataclass(kw_only=True)
class RolloutBatch(Batch):
    """Rollouts; completions are the `labels`, and a filler has none. Log-probs are fp32, 0 outside completions.

    What is named _BS has a row for each sample, padded on the right to the longest, also where `inputs` is packed.
    """

    completion_BS: Tensor  # bool, true at the completions' tokens
    engine_BS: Tensor  # log-probs by the inference engine
    advantage_B: Tensor  # fp32, 0 for fillers
    reward_B: Tensor  # fp32, NaN where no record tells it
    reference_BS: Tensor | None = None  # by the reference policy; None: none are needed
    old_BS: Tensor | None = None  # by the trainer's old policy; None: the live policy is the old one
    old_expert_BSLK: Tensor | None = None  # of the replayed experts, by the old policy's routers; None: as for `old_BS`


@dataclass(frozen=True)
class Rollouts(RecordKind[Rollout]):
    """Rollouts for one model."""

    one_file: ClassVar[str] = "rollouts of one group must stand in one"
    shape: RoutingShape | None  # the model's, where a routing is to be replayed; None: those of records are not used
    normalize_std: bool = True  # whether advantages are divided by the standard deviation of their group's rewards
    need_reference: bool = False  # whether every record must have the log-probs of a reference policy
    kinds: tuple[str, ...] | None = None  # labels that a record may have; None: those that the file's records have
    encodes: ClassVar = EncodedRollout

    def parse(self, record: object, where: str, root: Path | ImageRoot) -> Rollout:
        return parse_rollout(record, where, root, self.need_reference)

    def estimate(self, parsed: Rollout, max_pixels: int) -> int:
        if parsed.prompt is not None:
            return CHAT.estimate(parsed.prompt, max_pixels)
        image_tokens(parsed.images, max_pixels)  # only to refuse unreadable ones: `tokens` includes their tokens
        return len(parsed.tokens)

    def encode(
        self,
        parsed: Rollout,
        processor: Processor,
        max_length: int,
        max_pixels: int,
        rules: TokenRules = DEFAULT_RULES,
        pixels: Pixels = True,
    ) -> EncodedRollout:
        """Tokens, images and an aligned routing. Raises `RecordError` for what does not fit together or this model."""
        if parsed.prompt is not None:
            encoded = encode(parsed.prompt, processor, max_length, max_pixels, rules, pixels)
            completion = (encoded.labels != NO_LOSS) & (torch.arange(len(encoded.labels)) >= encoded.prompt)
        else:
            encoded = _encode_tokens(parsed, processor, max_length, max_pixels, pixels)
            completion = torch.tensor(parsed.mask)
        if int(completion.sum()) != len(parsed.logprobs):
            reason = f"{len(parsed.logprobs)} 'logprobs' for {int(completion.sum())} completion tokens"
            raise RecordError(f"{reason} (write one for each, the end token included)")
        plain = {field.name: getattr(encoded, field.name) for field in fields(Encoded)}
        return EncodedRollout(
            **{**plain, "kind": parsed.kind, "labels": encoded.input_ids.where(completion, NO_LOSS)},
            completion=completion,
            engine=_at_completion(parsed.logprobs, completion),
            reference=None if parsed.reference is None else _at_completion(parsed.reference, completion),
            routing=self._aligned(parsed, completion),
            advantage=parsed.advantage,
            reward=parsed.reward,
        )

    def _aligned(self, rollout: Rollout, completion: Tensor) -> Tensor | None:
        """(tokens up to the end of the completion, L, K): the experts that each of them replays."""
        if rollout.routing is None or self.shape is None:
            return None
        try:
            return rollout.routing.aligned(self.shape, completion)
        except UserError as error:
            raise RecordError(str(error)) from error

    def collate(self, encoded: list[Encoded], processor: Processor, packed: bool = False) -> RolloutBatch:
        """With a `shape`, `inputs` has "routing", (R, S, L, K) int16, LIVE where the router decides."""
        batch = collate(encoded, processor, packed=packed)

        def of_tokens(name: str, default: bool | float) -> Tensor:
            values = [getattr(one, name, None) for one in encoded]
            both = zip(values, encoded, strict=True)
            return lay_out([torch.full((len(one.input_ids),), default) if v is None else v for v, one in both], default)

        def numbers(name: str, default: float) -> Tensor:
            return torch.tensor([getattr(one, name, default) for one in encoded], dtype=torch.float32)

        if self.shape is not None:
            batch.inputs["routing"] = lay_out([self._routing(one) for one in encoded], LIVE, packed)
        return RolloutBatch(
            **vars(batch),
            completion_BS=of_tokens("completion", False),
            engine_BS=of_tokens("engine", 0.0),
            advantage_B=numbers("advantage", 0.0),
            reward_B=numbers("reward", UNKNOWN),
            reference_BS=of_tokens("reference", 0.0) if self.need_reference else None,
        )

    def _routing(self, one: Encoded) -> Tensor:
        """(S, L, K) int16: the experts that each token of a sample replays."""
        assert self.shape is not None
        size = (len(one.input_ids), len(self.shape.moe_layers), self.shape.top_k)
        routing = torch.full(size, LIVE, dtype=torch.int16)
        if isinstance(one, EncodedRollout) and one.routing is not None:
            routing[: len(one.routing)] = one.routing
        return routing

    def remember(self, parsed: Rollout) -> Outcome:
        return Outcome(parsed.reward, parsed.group, parsed.advantage, parsed.routing is not None)

    def complete(self, records: Records[Rollout]) -> RolloutRecords:
        return RolloutRecords(records, self.normalize_std, need_routing=self.shape is not None, kinds=self.kinds)


class RolloutRecords:
    """The rollouts of a file, with the advantages that follow from rewards; satisfies `Records`."""

    def __init__(
        self,
        records: Records[Rollout],
        normalize_std: bool,
        need_routing: bool = False,
        kinds: tuple[str, ...] | None = None,
    ) -> None:
        """Raises `UserError` if a routing is to be replayed and no record has one."""
        self._records = records
        self.sha256, self.lengths, self.bad = records.sha256, records.lengths, records.bad
        self.kinds, self.record_kind = records.kinds if kinds is None else kinds, records.record_kind
        self.remembered: list[Outcome] = records.remembered
        self.sources = records.sources
        if need_routing and not any(outcome.routed for outcome in self.remembered):
            raise UserError(
                "data.train: not one rollout has a 'routing' to replay (start the engine so that it returns routed "
                "experts, or set moe.replay.enabled to false)"
            )
        self._advantage_B = _advantages(self.remembered, normalize_std)

    def __len__(self) -> int:
        return len(self._records)

    def sample(self, index: int) -> Rollout:
        return replace(self._records.sample(index), advantage=float(self._advantage_B[index]))

    def where(self, index: int) -> str:
        return self._records.where(index)


def _advantages(outcomes: list[Outcome], normalize_std: bool) -> Tensor:
    """(B,) float64: each record's own advantage, or the one that its reward has within its group."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(one.group for one in outcomes))}
    group_B = torch.tensor([numbers[one.group] for one in outcomes])
    reward_B = torch.tensor([one.reward for one in outcomes], dtype=torch.float64)
    advantage_B = torch.tensor([one.advantage for one in outcomes], dtype=torch.float64)
    known_B, missing_B = ~reward_B.isnan(), advantage_B.isnan()
    earned_B = torch.zeros_like(reward_B)
    earned_B[known_B] = group_advantages(reward_B[known_B], group_B[known_B], normalize_std)
    advantage_B[missing_B] = earned_B[missing_B]
    return advantage_B


def _encode_tokens(rollout: Rollout, processor: Processor, max_length: int, max_pixels: int, pixels: Pixels) -> Encoded:
    pixel_values, grid, image_ids = encode_images(rollout.images, processor, max_pixels, pixels)
    of_images = tokens_of_images(image_ids, processor)
    check_length(len(rollout.tokens), of_images, max_length)
    input_ids = torch.tensor(rollout.tokens)
    vocabulary = len(processor.tokenizer)
    if int(input_ids.min()) < 0 or int(input_ids.max()) >= vocabulary:
        raise RecordError(f"'tokens' holds an id outside of the model's {vocabulary} (use the model's own tokenizer)")
    places = int(seen(input_ids, processor).sum())  # those of videos too, which collation makes image tokens of
    if places != of_images:
        reason = f"'tokens' holds {places} image tokens, its {len(image_ids)} images make {of_images}"
        raise RecordError(f"{reason} (write the ids the engine saw, and all of their images in order)")
    return Encoded(input_ids, torch.full_like(input_ids, NO_LOSS), rollout.mask.index(True), pixel_values, grid)


def _at_completion(values: list[float], mask_S: Tensor) -> Tensor:
    """(S,) fp32: the values in turn where the mask is true, zeros elsewhere."""
    return torch.zeros(len(mask_S)).masked_scatter(mask_S, torch.tensor(values))
