"""What a record of a data file is, and how it becomes tensors: conversations here, other kinds in tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from ds_moe.data.batch import Batch
from ds_moe.data.chat import BadRecord, Sample, parse_record
from ds_moe.data.encode import Encoded, collate, encode
from ds_moe.data.images import ImageSource, image_size
from ds_moe.data.processor import Processor

PIXELS_A_TOKEN = 32 * 32  # of Qwen3-VL; like the next it only ranks samples by length
CHARACTERS_A_TOKEN = 4


class ParsedRecord(Protocol):
    """What every kind of record has, once parsed."""

    @property
    def where(self) -> str:
        """file:line"""
        ...

    @property
    def kind(self) -> str | None:
        """The record's own label."""
        ...


Parsed = TypeVar("Parsed", bound=ParsedRecord)


class RecordKind(ABC, Generic[Parsed]):
    """One kind of record: `parse`, `encode` and `collate` run in data workers, which pickle it."""

    @abstractmethod
    def parse(self, record: object, where: str, root: Path) -> Parsed:
        """A record as JSON or Arrow gives it, its structure checked.

        Args:
            where: file:line, for messages.
            root: resolved folder that images must lie below.

        Raises:
            RecordError: what is wrong with the record, and the fix.
        """

    @abstractmethod
    def estimate(self, parsed: Parsed, max_pixels: int) -> int:
        """Tokens, roughly: they only rank records by length. Raises `RecordError` for an image's header."""

    @abstractmethod
    def encode(self, parsed: Parsed, processor: Processor, max_length: int, max_pixels: int) -> Encoded:
        """Tokens and patches. Raises `RecordError` for what only decoding or tokenizing shows."""

    @abstractmethod
    def collate(self, encoded: list[Encoded], processor: Processor) -> Batch:
        """A micro-batch of records and fillers; a filler is a plain `Encoded`, whatever the kind."""

    def remember(self, parsed: Parsed) -> object:
        """What of every record stays in memory, as `remembered` of the records."""
        return None

    def complete(self, records: Records[Parsed]) -> Records[Parsed]:
        """The records of a file, once all of them have been parsed and remembered."""
        return records


class Records(Protocol[Parsed]):
    """What a stream reads: only records whose structure is good are counted by `len` and given by `sample`."""

    sha256: str  # of the content: a resume refuses to go on with other data
    lengths: np.ndarray  # (len(self),) int64, estimated tokens
    bad: list[BadRecord]
    kinds: tuple[str, ...]  # labels of its records, sorted: the same on every rank
    record_kind: RecordKind[Parsed]
    remembered: list[Any]  # what `record_kind.remember` returned for each record

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Parsed:
        """Record `index`. Raises `RecordError` if an image of it has gone since the file was indexed."""
        ...

    def where(self, index: int) -> str:
        """file:line of record `index`."""
        ...


class Chat(RecordKind[Sample]):
    """Conversations, as `ds_moe.data.chat` reads them."""

    def parse(self, record: object, where: str, root: Path) -> Sample:
        return parse_record(record, where, root)

    def estimate(self, parsed: Sample, max_pixels: int) -> int:
        characters = sum(len(turn.text) for turn in parsed.turns)
        of_images = image_tokens(parsed.images, max_pixels)
        return 4 * len(parsed.turns) + characters // CHARACTERS_A_TOKEN + of_images

    def encode(self, parsed: Sample, processor: Processor, max_length: int, max_pixels: int) -> Encoded:
        return encode(parsed, processor, max_length, max_pixels)

    def collate(self, encoded: list[Encoded], processor: Processor) -> Batch:
        return collate(encoded, processor)


CHAT = Chat()


def image_tokens(images: list[ImageSource], max_pixels: int) -> int:
    """Tokens of these images, roughly, from their headers."""
    return sum(width * height for width, height in (image_size(one, max_pixels) for one in images)) // PIXELS_A_TOKEN
