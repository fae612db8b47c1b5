"""Encoded records in safetensors files: every tensor of a record one behind the other, and JSON for what is no tensor.

A file of n records holds, for each tensor field of their class, its values of all records along the first dimension and
the n + 1 bounds between them (`<field>.rows`); "about", the same of the JSON as bytes; and "crc" (n,), a checksum of
all that a record has. int64 lies there as int32, which no field is.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ds_moe.data.encode import Encoded
from ds_moe.weights.files import MappedFiles, write_tensors

ABOUT, CRC = "about", "crc"
PIXELS = "pixel_values"


class Damaged(Exception):
    """Says which file does not hold what was written."""


@dataclass(frozen=True)
class Stored:
    """A record as it is written, with what its writer notes about it (JSON)."""

    encoded: Encoded
    note: object = None


def write_shard(file: Path, records: Sequence[Stored], pixels: bool) -> None:
    """Write the records of a file, at least one; without `pixels` their images are left out."""
    tensors: dict[str, list[Tensor]] = {}
    bounds: dict[str, list[int]] = {}
    crc = []
    for number, record in enumerate(records):
        own = _tensors(record.encoded, pixels)
        plain = {field.name: getattr(record.encoded, field.name) for field in fields(record.encoded)}
        plain = {name: value for name, value in plain.items() if not isinstance(value, Tensor)}
        about = json.dumps({"tensors": [*own], "plain": plain, "note": record.note})
        own[ABOUT] = torch.frombuffer(bytearray(about.encode()), dtype=torch.uint8)
        crc.append(_checksum([*own.values()]))
        for name, value in own.items():
            tensors.setdefault(name, []).append(value)
        for name in tensors:
            ends = bounds.setdefault(name, [0] * (number + 1))
            ends.append(ends[-1] + (len(own[name]) if name in own else 0))
    flat = {name: torch.cat(values) for name, values in tensors.items()}
    flat |= {f"{name}.rows": torch.tensor(ends) for name, ends in bounds.items()}
    write_tensors(file, flat | {CRC: torch.tensor(crc)})


def read_record(files: MappedFiles, file: Path, number: int, form: type[Encoded]) -> Stored:
    """Record `number` of a file, an object of the class `form`. Raises `Damaged`."""
    try:
        raw = _rows(files, file, ABOUT, number)
        about = json.loads(raw.numpy().tobytes())
        own = {name: _rows(files, file, name, number) for name in about["tensors"]}
        if _checksum([*own.values(), raw]) != int(files.read(file, CRC, number, number + 1)):
            raise Damaged(f"{file}: record {number} of it is not what was written")
        values = {name: value.long() if value.dtype == torch.int32 else value.clone() for name, value in own.items()}
        return Stored(form(**about["plain"], **values), about["note"])
    except Damaged:
        raise
    except Exception as error:  # a library's, of a file that is cut off, or none of these
        raise Damaged(f"{file} cannot be read ({type(error).__name__})") from error


def _tensors(encoded: Encoded, pixels: bool) -> dict[str, Tensor]:
    """The tensor fields of a record, in their order, as they are written."""
    found = {}
    for field in fields(encoded):
        value = getattr(encoded, field.name)
        if isinstance(value, Tensor) and (pixels or field.name != PIXELS):
            if value.dtype == torch.int32:
                raise TypeError(f"{field.name} is int32, as which int64 is written")
            if value.dtype == torch.int64:
                short = value.int()
                if not torch.equal(short.long(), value):
                    raise ValueError(f"{field.name} has a value beyond 32 bits")
                value = short
            found[field.name] = value.contiguous()
    return found


def _rows(files: MappedFiles, file: Path, name: str, number: int) -> Tensor:
    start, stop = files.read(file, f"{name}.rows", number, number + 2).tolist()
    return files.read(file, name, start, stop)


def _checksum(values: Sequence[Tensor]) -> int:
    crc = 0
    for value in values:
        crc = zlib.crc32(np.ascontiguousarray(value.numpy()), crc)
    return crc
