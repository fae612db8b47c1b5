"""Safetensors files whose headers lie: for whatever reads such files."""

import json
import pickle
import struct


def written(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file as its format is: the header's length, the header, the tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(offsets: list[int], shape: list[int] | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [2] if shape is None else shape, "data_offsets": offsets}


LIES = {
    "empty": b"",
    "text": b"none",
    "a pickle": pickle.dumps({"a": 1}),
    "a zip": b"PK\x03\x04" + bytes(100),
    "a header of 8 EiB": written({}, length=2**63),
    "a header of 2 GiB": written({}, length=2**31),
    "a header longer than the file": written({}, length=100),
    "no JSON": written(b"{" * 8),
    "JSON nested 100,000 deep": written(b'{"a":' * 100_000),
    "a list": written([1]),
    "overlapping tensors": written({"a": tensor([0, 8]), "b": tensor([4, 12])}, bytes(12)),
    "a tensor beyond the end": written({"a": tensor([0, 8000])}, bytes(8)),
    "a tensor before the start": written({"a": tensor([-8, 0])}, bytes(8)),
    "offsets that run backwards": written({"a": tensor([8, 0])}, bytes(8)),
    "a hole": written({"a": tensor([8, 16])}, bytes(16)),
    "bytes behind the tensors": written({"a": tensor([0, 8])}, bytes(80)),
    "a shape larger than its bytes": written({"a": tensor([0, 8], [2_000_000])}, bytes(8)),
    "a shape that overflows": written({"a": tensor([0, 8], [2**63, 2**63])}, bytes(8)),
    "a type of its own": written({"a": tensor([0, 8], dtype="PICKLE")}, bytes(8)),
}
