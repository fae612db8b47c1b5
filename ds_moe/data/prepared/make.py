"""A folder of encoded records, made: every record of a data file is encoded once."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from ds_moe.config.run import RunConfig
from ds_moe.data.digits import Split
from ds_moe.data.encode import encode_images, tokens_of_images
from ds_moe.data.encoder import Encoder
from ds_moe.data.fingerprint import Fingerprint, fingerprint
from ds_moe.data.images import RecordError
from ds_moe.data.patches import BytePatches, with_byte_patches
from ds_moe.data.prepared.check import problem_of
from ds_moe.data.prepared.chunks import Chunk, Chunks
from ds_moe.data.prepared.folder import (
    COUNTS,
    FORMAT,
    INDEX,
    Prepared,
    digest_of,
    folder_of,
    open_prepared,
    prepared_in,
    sha256_of,
)
from ds_moe.data.prepared.report import write_report
from ds_moe.data.processor import ImageProcessor, Processor
from ds_moe.data.record_kind import Records, images_of
from ds_moe.data.sources.unpack import alone
from ds_moe.data.workers import loader_options
from ds_moe.errors import UserError
from ds_moe.weights.files import write_tensors

BYTES_OF_FLOATS = 8  # in place of a byte of an image, shown twice, where a processor makes no bytes
STORED_UP_TO = 2**34  # bytes of pixels that are stored unless asked otherwise, where the disk has three times as many


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
            problem = problem_of(target, made_of, records, encoder, pixels)
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


def pixels_a_token(images: ImageProcessor) -> int:
    """Pixels of an image, once it is resized, that become one token: a square of patches, unless a processor whose
    patches are no squares says otherwise, by an attribute of this name."""
    own = getattr(images, "pixels_a_token", None)
    return own if own is not None else (images.merge_size * images.patch_size) ** 2


def _stored(config: RunConfig, records: Records, processor: Processor, place: Path, pixels: bool | None) -> bool:
    """Whether images are stored: as they are resized, which may enlarge them, they have few bytes enough."""
    images = processor.image_processor
    if pixels is not None or images is None:
        return pixels is not False
    most, found = min(STORED_UP_TO, shutil.disk_usage(place).free // 3), 0
    as_bytes = isinstance(with_byte_patches(processor).image_processor, BytePatches)
    bytes_a_token = 3 * pixels_a_token(images) * (1 if as_bytes else BYTES_OF_FLOATS)
    for index in range(len(records)):
        try:
            of_record = images_of(records.sample(index))
            _, _, image_ids = encode_images(of_record, processor, config.data.max_pixels, pixels=False)
        except RecordError:  # a bad record, of which nothing is stored
            continue
        found += tokens_of_images(image_ids, processor) * bytes_a_token
        if found > most:
            return False
    return True


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
    chunks = Chunks(config, records, processor, folder, pixels)
    workers = min(workers, len(chunks)) if len(chunks) > 1 else 0
    found = Chunk()
    for number, chunk in enumerate(DataLoader(chunks, **loader_options(workers)), start=1):
        if isinstance(chunk, UserError):
            raise chunk
        found.add(chunk)
        if number % 16 == 0:
            note(f"{len(found.sizes):,} of {len(records):,} records")
    sizes = torch.tensor(found.sizes, dtype=torch.int64).reshape(-1, 2)
    write_tensors(folder / COUNTS, {"tokens": sizes[:, 0].clone(), "patches": sizes[:, 1].clone()})
    write_report(folder, found, records)
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
