"""Whether every record in a folder is there, and as it was written."""

from pathlib import Path

from ds_moe.data.chat import BadRecord
from ds_moe.data.encoder import Encoder
from ds_moe.data.fingerprint import Fingerprint
from ds_moe.data.images import RecordError
from ds_moe.data.prepared.folder import MAPPED, Prepared, open_prepared, sha256_of
from ds_moe.data.prepared.shards import Damaged, read_record
from ds_moe.data.prepared.stamps import Stamp, is_of, stamps_in, stamps_now
from ds_moe.data.record_kind import Records
from ds_moe.weights.files import MappedFiles


def problem_of(
    target: Path, made_of: Fingerprint, records: Records, encoder: Encoder, pixels: bool | None
) -> str | None:
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
        files, bounds = MappedFiles(MAPPED), [*found.index["starts"], len(found)]
        for name, start, stop in zip(found.index["shards"], bounds, bounds[1:], strict=False):
            for index in range(start, stop):
                problem = _problem_of_record(found, files, name, index, index - start, records, encoder)
                if problem is not None:
                    return problem
    except Damaged as error:
        return str(error)
    return None


def _problem_of_record(
    found: Prepared, files: MappedFiles, name: str, index: int, number: int, records: Records, encoder: Encoder
) -> str | None:
    """Of record `index`, which is record `number` of the file `name`. Raises `Damaged`."""
    if index in found.unstored:
        same = encoder.measure(index) == (found.tokens[index], found.patches[index])
        return None if same else f"a video of {records.where(index)} has changed since"
    if (why := found.bad.get(index)) is not None:
        again = encoder.encode_one(index)
        same = isinstance(again, BadRecord) and again.reason == why
        return None if same else f"{records.where(index)} was a bad record"
    stored = read_record(files, found.folder / name, number, records.record_kind.encodes)
    if not is_of(stored, index):
        return f"{name} is of other records"
    if stored.encoded.image_grid_thw is not None and _stamps(records, index) != stamps_in(stored):
        return f"an image of {records.where(index)} has changed since"
    return None


def _stamps(records: Records, index: int) -> list[Stamp] | None:
    try:
        return stamps_now(records.sample(index))
    except RecordError:  # an image is gone
        return None
