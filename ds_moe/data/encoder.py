"""Records become encoded samples; one that cannot be encoded is replaced and reported."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from ds_moe.config.run import RunConfig
from ds_moe.data.ahead import Ahead, MadeAhead
from ds_moe.data.chat import BadRecord, Sample, Turn
from ds_moe.data.chat_template import TokenRules
from ds_moe.data.encode import Encoded, encode_images, filler, patches_of, seen
from ds_moe.data.images import RecordError
from ds_moe.data.order import FILLER
from ds_moe.data.patches import BytePatches, with_byte_patches
from ds_moe.data.prepared.folder import Prepared
from ds_moe.data.prepared.stamps import stamps_now
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import ParsedRecord, Records, RecordsByIndex, images_of
from ds_moe.data.special_tokens import content_tokens_of

CACHE_BYTES = 128 * 2**20  # of encoded samples that a process keeps, so that small data are encoded once
FILLER_SAMPLE = Sample((Turn("user", ("",)), Turn("assistant", ("",))), where="filler")


@dataclass(frozen=True)
class Begun:
    """A record that an `Encoder` has begun with.

    Attributes:
        where: its file and line.
        parsed: what stands there; an error that reading it has raised; None: it is read later, or not at all.
        images: what makes the patches of its images; None: they are decoded where the record is encoded.
    """

    index: int
    where: str = ""
    parsed: ParsedRecord | Exception | None = None
    images: MadeAhead | None = None


class Encoder:
    """Encodes records by their index, and keeps the first `cache_bytes` of the results (None: CACHE_BYTES). Images stay
    bytes where the processor's floats follow from these.

    Args:
        prepared: of these records, as far as they were encoded before.

    Attributes:
        aside: why a prepared record was encoded anew, the first time; None: none was.
    """

    def __init__(
        self,
        config: RunConfig,
        records: RecordsByIndex,
        processor: Processor,
        cache_bytes: int | None = None,
        prepared: Prepared | None = None,
    ):
        self._prepared = prepared
        self.aside: str | None = None
        self._data, self._records, self._processor = config.data, records, with_byte_patches(processor)
        self._rules = TokenRules(config.data.train_on, content_tokens_of(config, processor), config.data.video)
        self._cache: dict[int, Encoded] = {FILLER: filler(processor)}
        self._cache_bytes, self._cached_bytes = CACHE_BYTES if cache_bytes is None else cache_bytes, 0

    def sample(self, begun: Begun, used: int) -> Sample:
        """The record, or what stands in for it where FILLER was `used` in its place."""
        if used == FILLER:
            return FILLER_SAMPLE
        return begun.parsed if isinstance(begun.parsed, Sample) else self._records.sample(used)

    def where(self, index: int) -> str:
        """file:line of a record."""
        return self._records.where(index)

    def encode(self, indices: list[int]) -> tuple[list[Encoded], list[int], list[BadRecord]]:
        """(encoded samples, their indices, bad records); a filler, of index FILLER, takes the place of a bad record."""
        return self.finish(map(self.begin, indices))

    def begin(self, index: int, ahead: Ahead | None = None) -> Begun:
        """Read a record, and let threads make the patches of its images. What is wrong with it `finish` says."""
        if index in self._cache or (self._prepared is not None and self._prepared.pixels):
            return Begun(index)
        where = self._records.where(index)
        try:
            parsed = self._records.sample(index)
            images = images_of(parsed)
        except Exception as error:
            return Begun(index, where, error)
        prepare = self._processor.image_processor
        if ahead is None or not images or not isinstance(prepare, BytePatches):  # another one may not bear threads
            return Begun(index, where, parsed)
        return Begun(index, where, parsed, ahead.begin(partial(patches_of, images, prepare, self._data.max_pixels)))

    def finish(self, begun: Iterable[Begun]) -> tuple[list[Encoded], list[int], list[BadRecord]]:
        """As `encode`, of records that have been begun, each of which is finished once."""
        encoded, used, bad = [], [], []
        for one in begun:
            index, result = one.index, self._finished(one)
            if isinstance(result, BadRecord):
                bad.append(result)
                index, result = FILLER, self._cache[FILLER]
            encoded.append(result)
            used.append(index)
        return encoded, used, bad

    def encode_one(self, index: int) -> Encoded | BadRecord:
        """A record, which is not kept."""
        return self._encode(self.begin(index), pixels=True)

    def measure(self, index: int) -> tuple[int, int] | BadRecord:
        """(tokens, patches) of a record, as encoding it gives them, but no image is decoded."""
        one = self._encode(self.begin(index), pixels=False)
        if isinstance(one, BadRecord):
            return one
        return self.size_of(one)

    def size_of(self, one: Encoded) -> tuple[int, int]:
        """(tokens, patches) of an encoded record."""
        images = self._processor.image_processor
        if images is None:
            return len(one.input_ids), 0
        return len(one.input_ids), int(seen(one.input_ids, self._processor).sum()) * images.merge_size**2

    def _encode(self, begun: Begun, pixels: bool) -> Encoded | BadRecord:
        kind, limits = self._records.record_kind, (self._data.max_length, self._data.max_pixels)
        try:
            if pixels and self._prepared is not None and (ready := self._ready(self._prepared, begun)) is not None:
                return ready
            return kind.encode(self._parsed(begun), self._processor, *limits, self._rules, begun.images or pixels)
        except RecordError as error:
            return BadRecord(begun.where or self._records.where(begun.index), str(error))

    def _parsed(self, begun: Begun) -> ParsedRecord:
        """Raises what reading the record raises."""
        if isinstance(begun.parsed, Exception):
            raise begun.parsed
        return self._records.sample(begun.index) if begun.parsed is None else begun.parsed

    def _ready(self, prepared: Prepared, begun: Begun) -> Encoded | None:
        """A prepared record; None where it must be encoded. Raises `RecordError` for an image that is not stored."""
        index, form = begun.index, self._records.record_kind.encodes
        one = prepared.encoded(index, form, lambda: stamps_now(self._records.sample(index)))
        self.aside = self.aside or prepared.problem
        if one is None or one.pixel_values is not None or one.image_grid_thw is None:
            return one
        images = images_of(self._parsed(begun))
        pixel_values, grid, _ = encode_images(images, self._processor, self._data.max_pixels, begun.images or True)
        if grid is None or not torch.equal(grid, one.image_grid_thw):
            self.aside = self.aside or f"an image of record {index} has changed since"
            return None
        return replace(one, pixel_values=pixel_values)

    def _finished(self, begun: Begun) -> Encoded | BadRecord:
        try:
            encoded = self._cache.get(begun.index) or self._encode(begun, pixels=True)
        finally:
            if begun.images is not None:
                begun.images.drop()  # where an error or the cache came before them
        if isinstance(encoded, BadRecord) or begun.index in self._cache:
            return encoded
        if self._cached_bytes + encoded.nbytes <= self._cache_bytes:
            self._cache[begun.index] = encoded
            self._cached_bytes += encoded.nbytes
        return encoded


def check_samples(
    config: RunConfig, records: Records, processor: Processor, indices: Iterable[int]
) -> tuple[list[BadRecord], list[int]]:
    """Encode these samples; return the bad ones among them, and the number of tokens of each other one."""
    encoder = Encoder(config, records, processor)
    found, lengths = [], []
    for index in indices:  # one by one: the pixels of one sample at a time are in memory
        [encoded], _, bad = encoder.encode([index])
        found += bad
        if encoded.real:
            lengths.append(len(encoded.input_ids))
    return found, lengths
