"""Encodes all records of a data file once, see `prepared.py`, and says what they are like."""

import json
import os
import shutil
import socket
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from ds_moe.config.run import RunConfig
from ds_moe.data.batch import NO_LOSS
from ds_moe.data.chat import BadRecord
from ds_moe.data.digits import Split
from ds_moe.data.encode import encode_images, filler
from ds_moe.data.encoder import Encoder
from ds_moe.data.fingerprint import Facts, Fingerprint, fingerprint
from ds_moe.data.images import RecordError, image_size
from ds_moe.data.patches import BytePatches, with_byte_patches
from ds_moe.data.prepared import (
    COUNTS,
    FORMAT,
    INDEX,
    Prepared,
    Stamp,
    digest_of,
    folder_of,
    is_of,
    note_of,
    open_prepared,
    prepared_in,
    sha256_of,
    stamps_in,
    stamps_now,
    stamps_of,
)
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import Records, conversation_of, images_of
from ds_moe.data.shards import Damaged, Stored, read_record, write_shard
from ds_moe.data.sources.unpack import alone
from ds_moe.data.special_tokens import special_tokens
from ds_moe.data.workers import start_method
from ds_moe.errors import UserError, one_line
from ds_moe.faults.signals import leave_to_parent
from ds_moe.weights.files import MappedFiles, write_tensors

CHUNK = 256  # records that a process encodes at a time
SHARD_BYTES = 2**27  # of encoded records, after which a file ends
REPORT = "report.json"
BYTES_OF_FLOATS = 8  # in place of a byte of an image, shown twice, where a processor makes no bytes
STORED_UP_TO = 2**34  # bytes of pixels that are stored unless asked otherwise, where the disk has three times as many
LIST_BAD = 100  # bad records that a report names
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


class _Chunks(Dataset):
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


def prepare(
    config: RunConfig,
    split: Split,
    records: Records,
    processor: Processor,
    pixels: bool | None,
    workers: int,
    note: Callable[[str], None],
) -> Prepared:
    """Encode the records, or find them encoded and whole. One process of a host works at a time.

    Args:
        pixels: whether images are stored, as bytes; None: where they are not too many.
        workers: processes.
        note: is told what takes time.

    Raises:
        UserError: the folder cannot be written, or a record has what cannot be stored.
    """
    made_of = json.loads(json.dumps(fingerprint(config, records, processor), default=str))
    target, place = folder_of(config, split, made_of), prepared_in(config)
    try:
        with alone(place / "prepare"):
            encoder = Encoder(config, records, processor)
            problem = _problem(target, made_of, records, encoder, pixels)
            if problem is None:
                note(f"{target}: there already, and whole")
                return open_prepared(target, made_of)
            if target.exists():
                note(f"{target}: made anew, because {problem}")
            own = f".{target.name}.{socket.gethostname()}"  # the lock is this host's
            partial = place / f"{own}.{os.getpid()}.partial"
            for left in place.glob(f"{own}.*.partial"):  # of a process that was killed
                shutil.rmtree(left)
            partial.mkdir()
            try:
                store = _stored(config, records, processor, place, pixels)
                _make(config, records, processor, made_of, partial, store, workers, note)
                if target.exists():
                    shutil.rmtree(target)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return open_prepared(target, made_of)
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error.strerror}): set data.prepared to another folder") from error


def read_report(prepared: Prepared) -> Facts:
    """What `prepare` has found. Raises `UserError` where the file is gone."""
    try:
        return json.loads((prepared.folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{prepared.folder / REPORT} cannot be read ({one_line(error)}); remove its folder") from error


def _stored(config: RunConfig, records: Records, processor: Processor, place: Path, pixels: bool | None) -> bool:
    """Whether images are stored: as they are resized, which may enlarge them, they have few bytes enough."""
    images = processor.image_processor
    if pixels is not None or images is None:
        return pixels is not False
    most, found = min(STORED_UP_TO, shutil.disk_usage(place).free // 3), 0
    as_bytes = isinstance(with_byte_patches(processor).image_processor, BytePatches)
    bytes_a_token = 3 * (images.merge_size * images.patch_size) ** 2 * (1 if as_bytes else BYTES_OF_FLOATS)
    for index in range(len(records)):
        try:
            of_record = images_of(records.sample(index))
            _, _, tokens = encode_images(of_record, processor, config.data.max_pixels, pixels=False)
        except RecordError:  # a bad record, of which nothing is stored
            continue
        found += sum(tokens) * bytes_a_token
        if found > most:
            return False
    return True


def _problem(target: Path, made_of: Fingerprint, records: Records, encoder: Encoder, pixels: bool | None) -> str | None:
    """Why a folder must be made anew; None: every record in it is there, and as it was written."""
    if not target.exists():
        return "it is not there"
    try:
        found = open_prepared(target, made_of)
        if pixels is not None and pixels != found.pixels:
            return f"it is {'without' if pixels else 'with'} images"
        for name, (_, sha256) in found.index["files"].items():
            if sha256_of(target / name) != sha256:
                return f"{name} is not what was written"
        files, bounds = MappedFiles(2**28), [*found.index["starts"], len(found)]
        form = records.record_kind.encodes
        for name, start, stop in zip(found.index["shards"], bounds, bounds[1:], strict=False):
            for number in range(stop - start):
                index = start + number
                if index in found.unstored:
                    if encoder.measure(index) != (found.tokens[index], found.patches[index]):
                        return f"a video of {records.where(index)} has changed since"
                    continue
                if (why := found.bad.get(index)) is not None:
                    again = encoder.encode_one(index)
                    if isinstance(again, BadRecord) and again.reason == why:
                        continue
                    return f"{records.where(index)} was a bad record"
                stored = read_record(files, target / name, number, form)
                if not is_of(stored, index):
                    return f"{name} is of other records"
                if stored.encoded.image_grid_thw is not None and _stamps(records, index) != stamps_in(stored):
                    return f"an image of {records.where(index)} has changed since"
    except Damaged as error:
        return str(error)
    return None


def _stamps(records: Records, index: int) -> list[Stamp] | None:
    try:
        return stamps_now(records.sample(index))
    except RecordError:  # an image is gone
        return None


def _make(
    config: RunConfig,
    records: Records,
    processor: Processor,
    made_of: Fingerprint,
    folder: Path,
    pixels: bool,
    workers: int,
    note: Callable[[str], None],
) -> None:
    """Fill an empty folder; the index is written last."""
    chunks = _Chunks(config, records, processor, folder, pixels)
    workers = min(workers, len(chunks)) if len(chunks) > 1 else 0
    options: Facts = {"num_workers": workers, "worker_init_fn": leave_to_parent}
    options |= {"generator": torch.Generator(), "multiprocessing_context": start_method(workers)}
    found = Chunk()
    for number, chunk in enumerate(DataLoader(chunks, batch_size=None, **options), start=1):
        if isinstance(chunk, UserError):
            raise chunk
        for name in ("shards", "sizes", "images", "unstored"):
            getattr(found, name).extend(getattr(chunk, name))
        found.labelled, found.with_images = found.labelled + chunk.labelled, found.with_images + chunk.with_images
        found.bad |= chunk.bad
        found.special += chunk.special
        if number % 16 == 0:
            note(f"{len(found.sizes):,} of {len(records):,} records")
    sizes = torch.tensor(found.sizes, dtype=torch.int64).reshape(-1, 2)
    write_tensors(folder / COUNTS, {"tokens": sizes[:, 0].clone(), "patches": sizes[:, 1].clone()})
    report = _report(found, records)
    (folder / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
    files = [folder / name for name in sorted([COUNTS, *(name for name, _ in found.shards)])]
    index = {
        **{"format": FORMAT, "made_of": made_of, "form": records.record_kind.encodes.__name__, "pixels": pixels},
        **{"shards": [name for name, _ in found.shards], "starts": [start for _, start in found.shards]},
        "unstored": found.unstored,
        "bad": {str(number): why for number, why in found.bad.items()},
        "files": {path.name: [path.stat().st_size, sha256_of(path)] for path in files},
    }
    with (folder / INDEX).open("w", encoding="utf-8") as stream:
        json.dump({"sha256": digest_of(index), "index": index}, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _report(found: Chunk, records: Records) -> dict[str, object]:
    """Counts, tokens, images, bad records and special tokens, for people."""
    tokens = [size for size, _ in found.sizes if size]
    bad = [{"where": one.where, "reason": one.reason} for one in records.bad]
    bad += [{"where": records.where(index), "reason": why} for index, why in found.bad.items()]
    pixels = [width * height for width, height in found.images]
    return {
        "records": len(tokens),
        "bad": len(bad),
        "bad_records": bad[:LIST_BAD],
        "tokens": {**_spread(tokens), "sum": sum(tokens), "labelled": found.labelled},
        "images": {**_spread(pixels), "count": len(pixels), "records": found.with_images, **_extremes(found.images)},
        "videos": len(found.unstored),
        "patches": sum(patches for _, patches in found.sizes),
        "special_tokens": dict(found.special.most_common()),
    }


def _spread(values: list[int]) -> dict[str, float]:
    if not values:
        return {}
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return {"min": min(values), "median": statistics.median(values), "p90": tenths[8], "max": max(values)}


def _extremes(images: list[tuple[int, int]]) -> dict[str, list[int]]:
    """Width and height of the smallest and the largest image."""
    if not images:
        return {}
    by_area = sorted(images, key=lambda size: size[0] * size[1])
    return {"smallest": list(by_area[0]), "largest": list(by_area[-1])}
