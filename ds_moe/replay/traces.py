"""Reads which experts an inference engine used for each token, from the formats of engines and rollout files.

They are expert ids only: the trainer computes the combine weights from its live logits.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ds_moe.errors import UserError, shown

FORMATS = (
    "record",  # our own, from JSON or Arrow: what `to_record` returns, or nested lists (rows, layers, K)
    "vllm",  # `CompletionOutput.routed_experts` of offline vLLM: (rows, decoder layers, K), dense layers all zero
    "vllm_http",  # `choices[i].routed_experts` of vLLM's server: base64 of an .npy file; nested lists before 0.22
    "sglang",  # `meta_info["routed_experts"]` of sglang: base64 of int32 without a header; rows of -1 are padding
    "prime_rl",  # of prime-rl's `/inference/v1/generate`: {"data": base64 of raw ids, "shape", "start", "dtype"}
    "megatron",  # Megatron's inference: (rows, MoE layers, K), without dense layers
)
SPLIT = ("prompt_routed_experts", "routed_experts")  # vLLM before 0.22: fields of the response and of each choice
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64")  # raw ids, little endian
MAX_ID = int(np.iinfo(np.int16).max)  # 8 bits would hold 256 experts; in 16, 4k tokens x 48 layers x 8 are 3 MiB


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Experts of consecutive input tokens of one sequence: row i routes input token `start + i`.

    The layers are either all decoder layers or only those with experts; `align` finds out which. Two traces are equal
    if they route alike, whatever their `source`.

    Raises:
        UserError: anything but integers that fit int16.
    """

    ids: np.ndarray  # (rows, layers, K) of any integer type, kept as int16; -1 where the engine recorded nothing
    start: int = 0  # index of the input token that row 0 routes
    source: str = ""  # a short name for error messages
    largest: int = MAX_ID  # id that the type of `ids` as given can hold; larger ones would have wrapped around

    def __post_init__(self) -> None:
        ids, start = _as_ids(self.ids, self.name), self.start
        if isinstance(start, bool) or not isinstance(start, int | np.integer) or start < 0:
            fix = "give the index of the input token that row 0 routes, from 0"
            raise UserError(f"{self.name}: start is {shown(start)} ({fix})")
        object.__setattr__(self, "largest", min(self.largest, int(np.iinfo(ids.dtype).max)))
        object.__setattr__(self, "ids", ids.astype(np.int16, copy=False))
        object.__setattr__(self, "start", int(start))

    @property
    def name(self) -> str:
        return self.source or "routing"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoutingTrace):
            return NotImplemented
        return np.array_equal(self.ids, other.ids) and self.start == other.start


def decode(
    value: object, *, kind: str, layers: int | None = None, top_k: int | None = None, start: int = 0
) -> RoutingTrace:
    """Decode the routing of a rollout record.

    Args:
        value: the routing in the format `kind`, one of `FORMATS`.
        layers, top_k: for sglang, whose bytes do not tell their shape.
        start: for formats that do not contain it.

    Raises:
        UserError: a value that is not of this format.
    """
    if kind not in FORMATS:
        raise UserError(f"routing: kind is {shown(kind)} (one of {', '.join(FORMATS)}; routing_format names it)")
    if kind in ("vllm", "vllm_http") and isinstance(value, Mapping):
        given = {key: part for key, part in value.items() if part is not None}
        if not given or not given.keys() <= set(SPLIT):
            raise UserError(f"{kind}: an object of {shown(list(given))} (give {' and '.join(SPLIT)}, or one of them)")
        parts = [_read(given[key], kind, layers, top_k, start) for key in SPLIT if key in given]
        if len({part.ids.shape[1:] for part in parts}) > 1:
            raise UserError(f"{kind}: {' and '.join(SPLIT)} differ in layers or top_k (give those of one response)")
        return replace(parts[0], ids=np.concatenate([part.ids for part in parts]))
    trace = _read(value, kind, layers, top_k, start)
    if start and trace.start != start:
        raise UserError(f"{kind}: start is {start}, but the value itself says {trace.start} (leave routing_start out)")
    return trace


def to_record(trace: RoutingTrace) -> dict[str, object]:
    """Convert a trace for JSON or Arrow: prime-rl's format."""
    data = base64.b64encode(trace.ids.astype("<i2").tobytes()).decode()
    return {"data": data, "shape": list(trace.ids.shape), "start": trace.start, "dtype": "int16"}


def _read(value: object, kind: str, layers: int | None, top_k: int | None, start: int) -> RoutingTrace:
    if isinstance(value, list) and not value and layers and top_k:  # a list without rows does not tell its shape
        value = np.empty((0, layers, top_k), np.int16)
    elif kind == "vllm_http" and not isinstance(value, list):
        value = _npy(value)
    elif kind == "sglang":
        value = _raw_int32(value, layers, top_k)
    elif kind == "prime_rl":
        return _from_fields(_completed(value, start), kind)
    elif kind == "record" and isinstance(value, Mapping):
        return _from_fields(value, kind)
    return RoutingTrace(value, start, source=kind)


def _as_ids(value: object, name: str) -> np.ndarray:
    try:
        ids = np.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        fix = "give rows x layers x top_k of equal lengths"
        raise UserError(f"{name}: expert ids are no array of numbers ({fix})") from error
    if ids.ndim != 3 or 0 in ids.shape[1:]:
        raise UserError(f"{name}: expert ids have the shape {ids.shape} (give rows x layers x top_k)")
    if ids.dtype.kind not in "iu":
        raise UserError(f"{name}: expert ids have the type {ids.dtype} (give integers)")
    wrong = (ids > MAX_ID) | (ids < -MAX_ID)
    if wrong.any():
        raise UserError(f"{name}: expert id {ids[wrong][0]} does not fit 16 bits (wrong dtype or byte order?)")
    return ids


def _npy(text: object) -> np.ndarray:
    file = io.BytesIO(_decode_base64(text, "vllm_http"))
    try:
        return np.lib.format.read_array(file, allow_pickle=False)  # np.load also reads pickles, which can run code
    except (ValueError, MemoryError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"vllm_http: no .npy array: {reason} (give the engine's string unchanged)") from error


def _raw_int32(text: object, layers: int | None, top_k: int | None) -> np.ndarray:
    if not layers or not top_k:
        raise UserError(f"sglang: layers is {layers}, top_k is {top_k} (give both: its bytes do not tell their shape)")
    raw = _decode_base64(text, "sglang")
    rows, rest = divmod(len(raw), 4 * layers * top_k)
    if rest:
        size = f"rows of {layers} layers x top-{top_k} int32"
        raise UserError(f"sglang: {len(raw)} bytes are no whole {size} (give the engine's model's layers and top_k)")
    return np.frombuffer(raw, "<i4").reshape(rows, layers, top_k)


def _completed(fields: object, start: int) -> object:
    """What prime-rl returned, with what its older versions left out: "start", and the oldest "dtype" as well, whose
    data are base85 of int32."""
    if not isinstance(fields, Mapping) or not {"data", "shape"} <= fields.keys():
        return fields
    if (encoding := fields.get("encoding", "base64")) != "base64":
        raise UserError(f"prime_rl: encoding is {shown(encoding)} (give base64)")
    fields = dict(fields)
    if fields.get("start") is None:
        fields["start"] = start
    if fields.get("dtype") is None:
        try:
            fields |= {"dtype": "int32", "data": base64.b64encode(base64.b85decode(fields["data"]))}
        except (ValueError, TypeError) as error:
            what = "without a dtype its data are base85 of int32"
            raise UserError(f"prime_rl: {what}: {error} (add the dtype)") from error
    return fields


def _from_fields(fields: object, name: str) -> RoutingTrace:
    if not isinstance(fields, Mapping) or not {"data", "shape", "start", "dtype"} <= fields.keys():
        found = ", ".join(fields) if isinstance(fields, Mapping) else type(fields).__name__
        raise UserError(f"{name}: {found} (give an object with data, shape, start and dtype)")
    dtype, shape = fields["dtype"], fields["shape"]
    if dtype not in DTYPES:
        raise UserError(f"{name}: dtype is {shown(dtype)} (one of {', '.join(DTYPES)})")
    sizes = isinstance(shape, Sequence | np.ndarray) and [isinstance(n, int | np.integer) and n >= 0 for n in shape]
    if sizes != [True] * 3 or max(shape) >= 2**31:
        raise UserError(f"{name}: shape is {shown(shape)} (give [rows, layers, top_k])")
    raw, kind = _decode_base64(fields["data"], name), np.dtype(dtype).newbyteorder("<")
    expected = math.prod(map(int, shape)) * kind.itemsize
    if len(raw) != expected:
        size = " x ".join(map(str, shape))
        raise UserError(f"{name}: {len(raw)} bytes, where {size} {dtype} are {expected} (shape or dtype is wrong)")
    return RoutingTrace(np.frombuffer(raw, kind).reshape(shape), fields["start"], source=name)


def _decode_base64(text: object, name: str) -> bytes:
    if not isinstance(text, str | bytes | bytearray | memoryview):
        raise UserError(f"{name}: {type(text).__name__} where base64 text is expected (routing_format names its form)")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise UserError(f"{name}: not base64: {error} (give the engine's string unchanged)") from error
