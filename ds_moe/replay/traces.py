"""Reads which experts an inference engine used for each token, from the formats of engines and rollout files.

Engines return expert ids only, and the trainer computes the combine weights from its live logits. A recording may hold
weights as well; they are checked and kept.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save

from ds_moe.errors import UserError, shown
from ds_moe.weights.files import read_arrays

MAX_ID = int(np.iinfo(np.int16).max)  # 8 bits would hold 256 experts; in 16, 4k tokens x 48 layers x 8 are 3 MiB
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64")  # raw ids, little endian
TOLERANCE = 1e-3  # of the sum of a token's weights, which may have been bf16
SPLIT = ("prompt_routed_experts", "routed_experts")  # vLLM before 0.22: fields of the response and of each choice


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
    weights: np.ndarray | None = None  # (rows, layers, K), kept as float32; see `with_weights`
    source: str = ""  # a short name for error messages
    largest: int = MAX_ID  # id that the type of `ids` as given can hold; larger ones would have wrapped around

    def __post_init__(self) -> None:
        ids = _as_ids(self.ids, self.name)
        object.__setattr__(self, "largest", min(self.largest, int(np.iinfo(ids.dtype).max)))
        object.__setattr__(self, "ids", ids.astype(np.int16, copy=False))
        object.__setattr__(self, "start", _as_start(self.start, self.name))
        if self.weights is not None:
            weights = _as_array(self.weights, f"{self.name}: weights", np.float32)
            if weights.shape != self.ids.shape:
                raise UserError(f"{self.name}: weights {weights.shape}, ids {self.ids.shape} (give one weight an id)")
            object.__setattr__(self, "weights", weights)

    @property
    def name(self) -> str:
        return self.source or "routing"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoutingTrace):
            return NotImplemented
        same = np.array_equal(self.ids, other.ids) and np.array_equal(self.weights, other.weights)
        return same and self.start == other.start


def _as_array(value: object, what: str, dtype: DTypeLike | None = None) -> np.ndarray:
    try:
        array = np.asarray(value, dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{what} are no array of numbers (give rows x layers x top_k of equal lengths)") from error
    if array.ndim != 3 or 0 in array.shape[1:]:
        raise UserError(f"{what} have the shape {array.shape} (give rows x layers x top_k)")
    return array


def _as_ids(value: object, name: str) -> np.ndarray:
    ids = _as_array(value, f"{name}: expert ids")
    if ids.dtype.kind not in "iu":
        raise UserError(f"{name}: expert ids have the type {ids.dtype} (give integers)")
    wrong = (ids > MAX_ID) | (ids < -MAX_ID)
    if wrong.any():
        raise UserError(f"{name}: expert id {ids[wrong][0]} does not fit 16 bits (wrong dtype or byte order?)")
    return ids


def _as_start(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise UserError(
            f"{name}: start is {shown(value)} (give the index of the input token that row 0 routes, from 0)"
        )
    return int(value)


def from_vllm(array: object, start: int = 0) -> RoutingTrace:
    """`CompletionOutput.routed_experts` of offline vLLM: (rows, decoder layers, K), dense layers all zero."""
    return RoutingTrace(array, start, source="vllm")


def from_vllm_http(text: object, start: int = 0) -> RoutingTrace:
    """`choices[i].routed_experts` of vLLM's server: base64 of an .npy file. `start`: `routed_experts_prompt_start`.

    Before 0.22 it was nested lists, which are read too.
    """
    if isinstance(text, list):
        return RoutingTrace(text, start, source="vllm_http")
    file = io.BytesIO(_decode_base64(text, "vllm_http"))
    try:
        array = np.lib.format.read_array(file, allow_pickle=False)  # np.load also reads pickles, which can run code
    except (ValueError, MemoryError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"vllm_http: no .npy array: {reason} (give the engine's string unchanged)") from error
    return RoutingTrace(array, start, source="vllm_http")


def from_sglang(text: str | bytes, layers: int | None, top_k: int | None, start: int = 0) -> RoutingTrace:
    """`meta_info["routed_experts"]` of sglang: base64 of int32 without a header. Rows of -1, for padding, are kept."""
    if not layers or not top_k:
        raise UserError(f"sglang: layers is {layers}, top_k is {top_k} (give both: its bytes do not tell their shape)")
    raw = _decode_base64(text, "sglang")
    rows, rest = divmod(len(raw), 4 * layers * top_k)
    if rest:
        size = f"rows of {layers} layers x top-{top_k} int32"
        raise UserError(f"sglang: {len(raw)} bytes are no whole {size} (give the engine's model's layers and top_k)")
    return RoutingTrace(np.frombuffer(raw, "<i4").reshape(rows, layers, top_k), start, source="sglang")


def from_prime_rl(fields: object, start: int = 0) -> RoutingTrace:
    """What prime-rl's `/inference/v1/generate` returns: {"data": base64 of raw ids, "shape", "start", "dtype"}.

    Older versions left out "start", and the oldest "dtype" as well: their data are base85 of int32.
    """
    if isinstance(fields, Mapping) and {"data", "shape"} <= fields.keys():
        if (encoding := fields.get("encoding", "base64")) != "base64":
            raise UserError(f"prime_rl: encoding is {shown(encoding)} (give base64)")
        fields = dict(fields)
        if fields.get("start") is None:
            fields["start"] = start
        if fields.get("dtype") is None:
            fields |= {"dtype": "int32", "data": _base64_of_base85(fields["data"])}
    return _from_fields(fields, "prime_rl")


def _base64_of_base85(text: object) -> bytes:
    try:
        return base64.b64encode(base64.b85decode(text))  # type: ignore[arg-type]  # of any other type: TypeError
    except (ValueError, TypeError) as error:
        raise UserError(f"prime_rl: without a dtype its data are base85 of int32: {error} (add the dtype)") from error


def from_megatron(array: object, start: int = 0) -> RoutingTrace:
    """Megatron's inference: (rows, MoE layers, K), without dense layers."""
    return RoutingTrace(array, start, source="megatron")


def from_record(value: object, start: int = 0) -> RoutingTrace:
    """Our own formats, read from JSON or Arrow: what `to_record` returns, or nested lists (rows, layers, K)."""
    return _from_fields(value, "record") if isinstance(value, Mapping) else RoutingTrace(value, start, source="record")


def to_record(trace: RoutingTrace) -> dict[str, object]:
    """Convert a trace for JSON or Arrow: prime-rl's format, plus "weights" (base64 of float32) if there are any."""
    data = base64.b64encode(trace.ids.astype("<i2").tobytes()).decode()
    record: dict[str, object] = {"data": data, "shape": list(trace.ids.shape), "start": trace.start, "dtype": "int16"}
    if trace.weights is not None:
        record["weights"] = base64.b64encode(trace.weights.astype("<f4").tobytes()).decode()
    return record


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
    trace = RoutingTrace(_decode_array(fields["data"], dtype, shape, name), fields["start"], source=name)
    if fields.get("weights") is None:  # Arrow writes None if only other records have weights
        return trace
    return with_weights(trace, _decode_array(fields["weights"], "float32", shape, f"{name}: weights"))


def _decode_array(text: object, dtype: str, shape: Sequence[int], name: str) -> np.ndarray:
    raw, kind = _decode_base64(text, name), np.dtype(dtype).newbyteorder("<")
    expected = math.prod(map(int, shape)) * kind.itemsize
    if len(raw) != expected:
        size = " x ".join(map(str, shape))
        raise UserError(f"{name}: {len(raw)} bytes, where {size} {dtype} are {expected} (shape or dtype is wrong)")
    return np.frombuffer(raw, kind).reshape(shape)


def _decode_base64(text: object, name: str) -> bytes:
    if not isinstance(text, str | bytes | bytearray | memoryview):
        raise UserError(f"{name}: {type(text).__name__} where base64 text is expected (routing_format names its form)")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise UserError(f"{name}: not base64: {error} (give the engine's string unchanged)") from error


# kind -> decoder of (value, layers, top_k, start)
FORMATS: dict[str, Callable[[object, int | None, int | None, int], RoutingTrace]] = {
    "record": lambda value, layers, top_k, start: from_record(value, start),
    "vllm": lambda value, layers, top_k, start: from_vllm(value, start),
    "vllm_http": lambda value, layers, top_k, start: from_vllm_http(value, start),
    "sglang": lambda value, layers, top_k, start: from_sglang(value, layers, top_k, start),
    "prime_rl": lambda value, layers, top_k, start: from_prime_rl(value, start),
    "megatron": lambda value, layers, top_k, start: from_megatron(value, start),
}


def decode(
    value: object, *, kind: str, layers: int | None = None, top_k: int | None = None, start: int = 0
) -> RoutingTrace:
    """Decode the routing of a rollout record.

    Args:
        value: the routing in the format `kind`.
        kind: a key of `FORMATS`.
        layers, top_k: for sglang, whose bytes do not tell their shape.
        start: for formats that do not contain it.

    Raises:
        UserError: a value that is not of this format.
    """
    if kind not in list(FORMATS):  # a list, because `kind` may be unhashable: it comes from a record
        raise UserError(f"routing: kind is {shown(kind)} (one of {', '.join(FORMATS)}; routing_format names it)")

    def read(part: object) -> RoutingTrace:
        if isinstance(part, list) and not part and layers and top_k:  # a list without rows does not tell its shape
            return RoutingTrace(np.empty((0, layers, top_k), np.int16), start, source=kind)
        return FORMATS[kind](part, layers, top_k, start)

    split = kind in ("vllm", "vllm_http") and isinstance(value, Mapping)
    trace = _of_parts(value, read, kind) if split else read(value)
    if start and trace.start != start:
        raise UserError(f"{kind}: start is {start}, but the value itself says {trace.start} (leave routing_start out)")
    return trace


def _of_parts(value: Mapping[str, object], read: Callable[[object], RoutingTrace], name: str) -> RoutingTrace:
    """The two fields in which vLLM before 0.22 returned the experts of a prompt and of its completion."""
    given = {key: part for key, part in value.items() if part is not None}
    if not given or not given.keys() <= set(SPLIT):
        raise UserError(f"{name}: an object of {shown(list(given))} (give {' and '.join(SPLIT)}, or one of them)")
    parts = [read(given[key]) for key in SPLIT if key in given]
    if len({part.ids.shape[1:] for part in parts}) > 1:
        raise UserError(f"{name}: {' and '.join(SPLIT)} differ in layers or top_k (give those of one response)")
    return replace(parts[0], ids=np.concatenate([part.ids for part in parts]))


def with_weights(trace: RoutingTrace, weights: object, renormalize: bool = False) -> RoutingTrace:
    """Add combine weights (rows, layers, K) and check them. Those of padding and dense layers may be all zero."""
    given = replace(trace, weights=weights).weights
    idle = (trace.ids <= 0).all(-1) & (given == 0).all(-1)
    return replace(trace, weights=check_weights(given, renormalize, ~idle, trace.name))


def check_weights(
    weights: object, renormalize: bool = False, routed: np.ndarray | None = None, source: str = "routing"
) -> np.ndarray:
    """Check weights (rows, layers, K), of which the K of a token must sum to 1, and return them as float32.

    Args:
        renormalize: divide the weights by their sum instead of checking it.
        routed: bool (rows, layers), false where the weights need not sum to 1.

    Raises:
        UserError: NaN, infinite or negative weights; a sum that is off by more than 1e-3, or that is zero and cannot be
            renormalized.
    """
    weights = _as_array(weights, f"{source}: weights", np.float32)
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        row, layer, k = np.argwhere(wrong)[0]
        cell = f"row {row}, layer {layer}: weight {weights[row, layer, k]}"
        raise UserError(f"{source}: {cell} (give finite weights that are not negative)")
    total = weights.sum(-1, keepdims=True)
    routed = np.ones(weights.shape[:-1], bool) if routed is None else routed
    off = routed & ((total == 0) if renormalize else (abs(total - 1) > TOLERANCE)).squeeze(-1)
    if off.any():
        row, layer = np.argwhere(off)[0]
        fix = "they cannot be renormalized" if renormalize else "give weights that sum to 1, or renormalize them"
        raise UserError(f"{source}: row {row}, layer {layer}: weights sum to {total[row, layer, 0]:.4g} ({fix})")
    return weights / np.where(total == 0, 1, total) if renormalize else weights


def save_traces(path: str | Path, traces: Mapping[str, RoutingTrace]) -> None:
    """Write traces, by name, into one safetensors file: int16 ids, float32 weights; start and source as metadata."""
    arrays = {f"ids/{name}": trace.ids for name, trace in traces.items()}
    arrays |= {f"weights/{name}": trace.weights for name, trace in traces.items() if trace.weights is not None}
    about = {name: {"start": trace.start, "source": trace.source} for name, trace in traces.items()}
    dense = {key: np.ascontiguousarray(array) for key, array in arrays.items()}  # safetensors ignores strides
    Path(path).write_bytes(save(dense, metadata={"traces": json.dumps(about)}))


def load_traces(path: str | Path) -> dict[str, RoutingTrace]:
    """Read the traces that `save_traces` wrote, by name. Raises `UserError` for any other file."""
    if not Path(path).is_file():  # opening a pipe would wait for its writer
        raise UserError(f"{path}: no file of routing traces (write it with save_traces)")
    try:
        arrays, metadata = read_arrays(Path(path))
        about = json.loads(metadata["traces"])
        return {n: RoutingTrace(arrays[f"ids/{n}"], weights=arrays.get(f"weights/{n}"), **about[n]) for n in about}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: no file of routing traces: {error} (write it with save_traces)") from error
