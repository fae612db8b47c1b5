"""What one process encodes and writes of a folder: neighbouring records."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from torch.utils.data import Dataset

from ds_moe.config.run import RunConfig
from ds_moe.data.batch import NO_LOSS
from ds_moe.data.chat import BadRecord
from ds_moe.data.encode import filler
from ds_moe.data.encoder import Encoder
from ds_moe.data.images import RecordError, image_size
from ds_moe.data.prepared.shards import Stored, write_shard
from ds_moe.data.prepared.stamps import Stamp, note_of, stamps_of
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import Records, conversation_of, images_of
from ds_moe.data.special_tokens import special_tokens
from ds_moe.errors import UserError, one_line

CHUNK = 256  # records that a process encodes at a time
SHARD_BYTES = 2**27  # of encoded records, after which a file ends
UNKNOWN: Stamp = ("", 0, 0)  # of a record whose images could not be looked at: it is encoded anew


@dataclass
class Chunk:
    """What one process has found in neighbouring records, and the files that it has written."""

    shards: list[tuple[str, int]] = field(default_factory=list)  # name, index of the first record
    sizes: list[tuple[int, int]] = field(default_factory=list)  # tokens and patches of each record; 0 of a bad one
    labelled: int = 0  # tokens
    bad: dict[int, str] = field(default_factory=dict)
    unstored: list[int] = field(default_factory=list)  # records with videos
    images: list[tuple[int, int]] = field(default_factory=list)  # width and height, as stored
    with_images: int = 0  # records
    special: Counter[str] = field(default_factory=Counter)  # tokens that texts write and nobody has named

    def add(self, behind: Chunk) -> None:
        """Take in what was found in the records behind these."""
        self.shards += behind.shards
        self.sizes += behind.sizes
        self.labelled += behind.labelled
        self.bad |= behind.bad
        self.unstored += behind.unstored
        self.images += behind.images
        self.with_images += behind.with_images
        self.special += behind.special


class Chunks(Dataset):
    """Encodes and writes CHUNK neighbouring records; loading processes do it."""

    def __init__(self, config: RunConfig, records: Records, processor: Processor, folder: Path, pixels: bool):
        self.records, self.folder, self.pixels = records, folder, pixels
        self.encoder = Encoder(config, records, processor)
        self.filler = filler(processor)
        self.special, self.named = special_tokens(processor), set(config.data.content_tokens)
        self.max_pixels = config.data.max_pixels

    def __len__(self) -> int:
        return ceil(len(self.records) / CHUNK)

    def __getitem__(self, number: int) -> Chunk | UserError:
        found, waiting, size = Chunk(), list[Stored](), 0
        first, last = number * CHUNK, min((number + 1) * CHUNK, len(self.records))
        try:
            for index in range(first, last):
                record = self._record(index, found)
                waiting.append(record)
                size += record.encoded.nbytes
                if size >= SHARD_BYTES or index == last - 1:
                    name = f"{number:05d}-{len(found.shards):03d}.safetensors"
                    write_shard(self.folder / name, waiting, self.pixels)
                    found.shards.append((name, index + 1 - len(waiting)))
                    waiting, size = [], 0
        except UserError as error:
            return error
        except Exception as error:  # a full disk, of which safetensors makes an error of its own
            return UserError(f"{self.folder} cannot be written ({one_line(error)})")
        return found

    def _record(self, index: int, found: Chunk) -> Stored:
        """A record and the stamps of its images; an empty one in place of a bad one."""
        stamps, conversation = [UNKNOWN], None
        try:
            parsed = self.records.sample(index)
            images = images_of(parsed)
            stamps = stamps_of(images)  # before they are read
            conversation = conversation_of(parsed)
            texts = [turn.written for turn in conversation.turns] if conversation is not None else []
            found.special.update(one[0] for one in self.special.finditer("\n".join(texts)) if one[0] not in self.named)
            found.images += [image_size(image, self.max_pixels) for image in images]
            found.with_images += bool(images)
        except (RecordError, OSError):
            pass  # encoding it says the same
        one = self.encoder.encode_one(index)
        if isinstance(one, BadRecord):
            found.bad[index] = one.reason
            found.sizes.append((0, 0))
            return Stored(self.filler)
        found.sizes.append(self.encoder.size_of(one))
        found.labelled += int((one.labels != NO_LOSS).sum())
        if conversation is not None and conversation.videos:  # whose files and frames nobody looks at again
            found.unstored.append(index)
            return Stored(self.filler)
        return Stored(one, note_of(index, stamps))
