"""Records of a gate: conversations that name the adapter which should answer, `"adapter": "<name>"`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ds_moe.data.chat import Sample, parse_record
from ds_moe.data.encode import NO_LOSS, Batch, Encoded, collate, encode
from ds_moe.data.images import RecordError
from ds_moe.data.record_kind import CHAT, Form

UNANSWERED = {"role": "assistant", "content": "-"}  # never read: what a request is given where an answer must stand


@dataclass(frozen=True)
class RoutedSample(Sample):
    """A conversation and the adapter that should answer it; None where the record does not say."""

    adapter: str | None = None


@dataclass(frozen=True)
class RoutedEncoded(Encoded):
    adapter: int = NO_LOSS  # index of the adapter, NO_LOSS for none


def gate_form(names: list[str], labelled: bool) -> Form:
    """Records for a gate over the adapters `names`; `labelled`: each must name one of them."""
    parse = partial(_parse, names=names, labelled=labelled)
    return CHAT._replace(parse=parse, encode=partial(_encode, names=names), collate=_collate, keep=_adapter_of)


def request_form(names: list[str]) -> Form:
    """Requests to be routed: as `gate_form`, but the last turn may be the user's."""
    form = gate_form(names, labelled=False)
    return form._replace(parse=partial(_parse_request, names=names))


def _parse_request(record: Any, where: str, root: Path, *, names: list[str]) -> RoutedSample:
    key = next((key for key in ("messages", "conversations") if isinstance(record, dict) and key in record), None)
    turns = record[key] if key is not None else None
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        if (turns[-1].get("role") or turns[-1].get("from")) in ("user", "human"):
            record = {**record, key: [*turns, UNANSWERED]}
    return _parse(record, where, root, names=names, labelled=False)


def _parse(record: Any, where: str, root: Path, *, names: list[str], labelled: bool) -> RoutedSample:
    sample = parse_record(record, where, root)
    adapter = record.get("adapter")
    if adapter is None and labelled:
        raise RecordError(f"no 'adapter' (name the one that should answer: {', '.join(names)})")
    if adapter is not None and adapter not in names:
        raise RecordError(f"'adapter' is {adapter!r}, which is none of the gate's (use {', '.join(names)})")
    values = {field.name: getattr(sample, field.name) for field in fields(sample)}
    return RoutedSample(**{**values, "kind": sample.kind or adapter}, adapter=adapter)


def _encode(sample: RoutedSample, processor: Any, max_length: int, max_pixels: int, *, names: list[str]) -> Encoded:
    encoded = encode(sample, processor, max_length, max_pixels)
    values = {field.name: getattr(encoded, field.name) for field in fields(encoded)}
    return RoutedEncoded(**values, adapter=NO_LOSS if sample.adapter is None else names.index(sample.adapter))


def _collate(encoded: list[Encoded], processor: Any) -> Batch:
    """A micro-batch with "adapter", (B,) int64, beside what the model takes."""
    labels = [getattr(one, "adapter", NO_LOSS) for one in encoded]  # a filler has none
    return collate(encoded, processor) | {"adapter": torch.tensor(labels)}


def _adapter_of(sample: RoutedSample) -> str | None:
    return sample.adapter
