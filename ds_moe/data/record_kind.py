"""What a record of a data file is and how it becomes tensors. Conversations are defined here, other kinds by tasks."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from ds_moe.data.batch import Batch
from ds_moe.data.chat import BadRecord, Sample, parse_record
from ds_moe.data.chat_template import DEFAULT_RULES, TokenRules
from ds_moe.data.encode import Encoded, Pixels, collate, encode
from ds_moe.data.images import ImageRoot, ImageSource, image_size
from ds_moe.data.processor import Processor
from ds_moe.data.videos import VideoSource

# Rough figures of Qwen3-VL: they only rank samples by length.
PIXELS_A_TOKEN = 32 * 32
CHARACTERS_A_TOKEN = 4
BYTES_A_TOKEN = 256  # of an encoded video
MOST_OF_VIDEO = 16384  # tokens, which the processor's settings limit


class ParsedRecord(Protocol):
    """What a parsed record of any kind tells."""

    @property
    def where(self) -> str:
        """file:line of the record."""
        ...

    @property
    def kind(self) -> str | None:
        """The label that the record gives itself, for figures per kind; None: it gives none."""
        ...


Parsed = TypeVar("Parsed", bound=ParsedRecord)


class RecordKind(ABC, Generic[Parsed]):
    """One kind of record. Loading processes get a pickled copy, which parses, encodes and collates.

    Attributes:
        encodes: the class of what `encode` returns.
    """

    encodes: ClassVar[type[Encoded]] = Encoded

    one_file: ClassVar[str] = ""  # why the records of a run must stand in one file; empty: they need not

    @abstractmethod
    def parse(self, record: object, where: str, root: Path | ImageRoot) -> Parsed:
        """Check the structure of a record that JSON or Arrow has given.

        Args:
            where: file:line of the record.
            root: the folder below which images and videos must be, symlinks resolved, or what takes its place.

        Raises:
            RecordError: the message says what is wrong and ends with the fix.
        """

    @abstractmethod
    def estimate(self, parsed: Parsed, max_pixels: int) -> int:
        """About how many tokens it has, which ranks records by length. Raises `RecordError` for an unreadable image."""

    @abstractmethod
    def encode(
        self,
        parsed: Parsed,
        processor: Processor,
        max_length: int,
        max_pixels: int,
        rules: TokenRules = DEFAULT_RULES,
        pixels: Pixels = True,
    ) -> Encoded:
        """Tokens and patches; with `pixels` False the same tokens alone, for which no image is decoded.

        Patches that are made ahead are those of the images of `images_of`, in that order.

        Raises `RecordError` for what only decoding or tokenizing can show.
        """

    @abstractmethod
    def collate(self, encoded: list[Encoded], processor: Processor, packed: bool = False) -> Batch:
        """A micro-batch of records and fillers, in padded rows or in one packed row (see `encode.collate`).

        A filler is a plain `Encoded`, whatever the kind of record.
        """

    def remember(self, parsed: Parsed) -> object:
        """What is kept in memory of every record, in `Records.remembered`."""
        return None

    def complete(self, records: Records[Parsed]) -> Records[Parsed]:
        """Called once all records of a file have been parsed and remembered; returns the records to use."""
        return records


@dataclass(frozen=True)
class SourceFacts:
    """One of several sources of records."""

    name: str
    records: int
    sha256: str


class RecordsByIndex(Protocol[Parsed]):
    """Records of which nothing is known before they are read."""

    record_kind: RecordKind[Parsed]

    def sample(self, index: int) -> Parsed:
        """Record `index`. Raises `RecordError` where it cannot be used."""
        ...

    def where(self, index: int) -> str:
        """Where record `index` stands: its file and line."""
        ...


class Records(RecordsByIndex[Parsed], Protocol[Parsed]):
    """The records of a file, or of several, whose structure is good, by index; `bad` are the others."""

    sha256: str  # of the files' content: a run does not resume with other data
    sources: tuple[SourceFacts, ...]  # in the order of their records; none where all records have one source
    lengths: np.ndarray  # (len(self),) int64, estimated tokens
    bad: list[BadRecord]
    kinds: tuple[str, ...]  # labels of its records, sorted: the same on every rank
    remembered: list[Any]  # what `record_kind.remember` returned for each record

    def __len__(self) -> int: ...


class Chat(RecordKind[Sample]):
    """Conversations, as `ds_moe.data.chat` reads them."""

    def parse(self, record: object, where: str, root: Path | ImageRoot) -> Sample:
        return parse_record(record, where, root)

    def estimate(self, parsed: Sample, max_pixels: int) -> int:
        characters = sum(len(turn.written) for turn in parsed.turns)
        characters += len(json.dumps(parsed.tools)) if parsed.tools else 0
        of_images = image_tokens(parsed.images, max_pixels) + sum(map(video_tokens, parsed.videos))
        return 4 * len(parsed.turns) + characters // CHARACTERS_A_TOKEN + of_images

    def encode(
        self,
        parsed: Sample,
        processor: Processor,
        max_length: int,
        max_pixels: int,
        rules: TokenRules = DEFAULT_RULES,
        pixels: Pixels = True,
    ) -> Encoded:
        return encode(parsed, processor, max_length, max_pixels, rules, pixels)

    def collate(self, encoded: list[Encoded], processor: Processor, packed: bool = False) -> Batch:
        return collate(encoded, processor, packed=packed)


CHAT = Chat()


def video_tokens(video: VideoSource) -> int:
    """About how many tokens a video has, by its bytes alone: it is opened when it is loaded."""
    if video.frames:
        width, height = image_size(video.frames[0], sys.maxsize)
        return len(video.frames) // 2 * width * height // PIXELS_A_TOKEN
    size = len(video.data) if video.data is not None else video.path.stat().st_size
    return min(size // BYTES_A_TOKEN, MOST_OF_VIDEO)


def conversation_of(parsed: object) -> Sample | None:
    """The conversation of a parsed record of any kind; None where it holds tokens instead."""
    found = getattr(parsed, "prompt", parsed)
    return found if isinstance(found, Sample) else None


def images_of(parsed: object) -> list[ImageSource]:
    """The images of a parsed record of any kind, in the order in which it is encoded."""
    return list(getattr(conversation_of(parsed) or parsed, "images"))  # noqa: B009


def image_tokens(images: list[ImageSource], max_pixels: int) -> int:
    """About how many tokens these images have. Only their headers are read."""
    return sum(width * height for width, height in (image_size(one, max_pixels) for one in images)) // PIXELS_A_TOKEN
