"""Records of a gate: conversations that name the adapter which should answer them, `"adapter": "<name>"`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ds_moe.data.batch import NO_LOSS, Batch
from ds_moe.data.chat import Sample, parse_record
from ds_moe.data.chat_template import DEFAULT_RULES, TokenRules
from ds_moe.data.encode import Encoded, Pixels, collate, encode
from ds_moe.data.images import ImageRoot, RecordError
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import CHAT, RecordKind

# Added to a request because a conversation must end with an answer; the gate does not read answers.
UNANSWERED = {"role": "assistant", "content": "-"}


@dataclass(frozen=True)
class RoutedSample(Sample):
    """A conversation and the adapter that should answer it; None where the record does not say."""

    adapter: str | None = None


@dataclass(frozen=True)
class RoutedEncoded(Encoded):
    adapter: int = NO_LOSS  # index of the adapter, NO_LOSS for none


@dataclass(kw_only=True)
class RoutedBatch(Batch):
    """Conversations; `adapter_B` (B,) int64 holds the index of the adapter that each names, NO_LOSS for none."""

    adapter_B: Tensor


@dataclass(frozen=True)
class Routed(RecordKind[RoutedSample]):
    """Conversations for a gate over the adapters `names`; with `labelled` each must name one of these.

    Labelled records may end with a question: a gate that learns from labels reads no answer.
    """

    names: Sequence[str]
    labelled: bool
    encodes: ClassVar = RoutedEncoded

    def parse(self, record: object, where: str, root: Path | ImageRoot) -> RoutedSample:
        sample = parse_record(_answered(record) if self.labelled else record, where, root)
        adapter = record.get("adapter") if isinstance(record, dict) else None
        if adapter is None and self.labelled:
            raise RecordError(f"no 'adapter' (name the one that should answer: {', '.join(self.names)})")
        if adapter is not None and adapter not in self.names:
            raise RecordError(f"'adapter' is {adapter!r}, which is none of the gate's (use {', '.join(self.names)})")
        values = {field.name: getattr(sample, field.name) for field in fields(sample)}
        return RoutedSample(**{**values, "kind": sample.kind or adapter}, adapter=adapter)

    def estimate(self, parsed: RoutedSample, max_pixels: int) -> int:
        return CHAT.estimate(parsed, max_pixels)

    def encode(
        self,
        parsed: RoutedSample,
        processor: Processor,
        max_length: int,
        max_pixels: int,
        rules: TokenRules = DEFAULT_RULES,
        pixels: Pixels = True,
    ) -> RoutedEncoded:
        encoded = encode(parsed, processor, max_length, max_pixels, rules, pixels)
        values = {field.name: getattr(encoded, field.name) for field in fields(encoded)}
        index = NO_LOSS if parsed.adapter is None else self.names.index(parsed.adapter)
        return RoutedEncoded(**values, adapter=index)

    def collate(self, encoded: list[Encoded], processor: Processor, packed: bool = False) -> RoutedBatch:
        adapters = [
            one.adapter if isinstance(one, RoutedEncoded) else NO_LOSS for one in encoded
        ]  # a filler names none
        return RoutedBatch(**vars(collate(encoded, processor, packed=packed)), adapter_B=torch.tensor(adapters))

    def remember(self, parsed: RoutedSample) -> str | None:
        """The adapter that the record names."""
        return parsed.adapter


def _answered(record: object) -> object:
    """The record, with an answer that nobody reads behind a question that has none."""
    if not isinstance(record, dict):
        return record
    key = next((key for key in ("messages", "conversations") if key in record), None)
    turns = record[key] if key is not None else None
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
        return record
    asks = (turns[-1].get("role") or turns[-1].get("from")) in ("user", "human", "tool")
    return {**record, key: [*turns, UNANSWERED]} if asks else record


class Requests(Routed):
    """Requests to be routed: they need not name an adapter, and their last turn may be the user's."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names, labelled=False)

    def parse(self, record: object, where: str, root: Path | ImageRoot) -> RoutedSample:
        return super().parse(_answered(record), where, root)
