"""Routing traces and rollouts from an engine that is wrong, or that is none."""

import base64
import gzip
import io
import json
import pickle
import zipfile

import numpy as np
import pytest

from ds_moe.replay import RoutingShape, RoutingTrace, align, decode, to_record
from ds_moe.tasks.rl.rollouts import Rollouts

from .limits import Payload, refusal

SHAPE = RoutingShape(layers=2, moe_layers=(0, 1), experts=8, top_k=2)
IDS = np.tile(np.array([3, 1], dtype=np.int16), (4, 2, 1))
TOKENS, MASK = [5, 6, 7, 8, 9], [0, 0, 0, 1, 1]


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def npy(array: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def header(shape: str, kind: str = "<i2", data: bytes = b"") -> bytes:
    """An .npy file whose header says this."""
    line = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\0" + len(line).to_bytes(2, "little") + line + data


def zipped(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ids.npy", data)
    return stream.getvalue()


def record(**changes) -> dict:
    return to_record(RoutingTrace(IDS)) | changes


def ids(*cells: list[int]) -> list:
    """Four rows of two layers, the first cells of which are these."""
    rows = IDS.tolist()
    for number, cell in enumerate(cells):
        rows[number // 2][number % 2] = cell
    return rows


NO_ARRAY, NO_BASE64 = "vllm_http: no .npy array", "not base64"
# name -> (kind, value, what the error says)
TRACES = {
    "an array of objects": ("vllm_http", text(npy(np.array([{}]), allow_pickle=True)), NO_ARRAY),
    "a pickle": ("vllm_http", text(pickle.dumps([1])), NO_ARRAY),
    "a zip": ("vllm_http", text(zipped(npy(IDS))), NO_ARRAY),
    "a zip bomb": ("vllm_http", text(zipped(bytes(2 * 10**8))), NO_ARRAY),
    "a gzip bomb": ("vllm_http", text(gzip.compress(bytes(2 * 10**8))), NO_ARRAY),
    "a header of terabytes": ("vllm_http", text(header("(1000000000000, 2, 2)")), NO_ARRAY),
    "a header of gigabytes": ("vllm_http", text(header("(1000000000, 2, 2)")), NO_ARRAY),
    "a header below 0": ("vllm_http", text(header("(-1, 2, 2)", data=bytes(32))), "vllm_http"),
    "a header that calls": ("vllm_http", text(header("__import__('os').mkdir('CANARY')")), NO_ARRAY),
    "a header that is nested": ("vllm_http", text(header("(" * 200 + ")" * 200)), NO_ARRAY),
    "an array cut off": ("vllm_http", text(npy(IDS)[:-8]), NO_ARRAY),
    "floats": ("vllm_http", text(npy(IDS.astype(np.float32))), "expert ids have the type float32"),
    "dates": ("vllm_http", text(npy(IDS.astype("<M8[s]"))), "expert ids have the type datetime64"),
    "two dimensions": ("vllm_http", text(npy(IDS[0])), "have the shape (2, 2)"),
    "junk": ("vllm_http", "!" * 100, NO_BASE64),
    "no ASCII": ("sglang", "\u00e9" * 4, NO_BASE64),
    "base64 cut off": ("sglang", text(bytes(64))[:-1], NO_BASE64),
    "a number": ("sglang", 5, "where base64 text is expected"),
    "bytes that are no rows": ("sglang", text(bytes(17)), "are no whole rows of 2 layers x top-2"),
    "ids of another byte order": ("sglang", text(IDS.astype(">i4").tobytes()), "does not fit 16 bits"),
    "nested lists of uneven length": ("record", [[[1, 2]], [[1]]], "are no array of numbers"),
    "lists 100 deep": ("record", json.loads("[" * 100 + "]" * 100), "are no array of numbers"),
    "text for ids": ("record", [[["a", "b"]]], "expert ids have the type <U1"),
    "ids of 400 digits": ("record", [[[10**400, 1]]], "expert ids have the type object"),
    "NaN for ids": ("record", [[[float("nan"), 1]]], "expert ids have the type float64"),
    "nothing": ("record", [], "0 rows, but 4 of 5 input tokens from 0 on have one"),
    "a dtype of objects": ("record", record(dtype="object"), "dtype is 'object' (one of"),
    "a dtype that is a list": ("record", record(dtype=["<i2"]), "dtype is ['<i2'] (one of"),
    "a shape that lies": ("record", record(shape=[10**9, 2, 2]), "bytes, where 1000000000 x 2 x 2 int16"),
    "a shape that overflows": ("record", record(shape=[0, 2**63, 2], data=""), "shape is [0, 92233720"),
    "a shape below 0": ("record", record(shape=[-4, -2, 2]), "shape is [-4, -2, 2]"),
    "a start below 0": ("record", record(start=-1), "start is -1"),
    "a start as text": ("record", record(start="0"), "start is '0'"),
    "a start of 400 digits": ("record", record(start=10**400), "starts at token"),
    "an unknown kind": ("pickle", "x", "kind is 'pickle' (one of"),
    "a kind that is a list": (["record"], "x", "kind is ['record'] (one of"),
    "a kind of 1 MB": ("x" * 10**6, "x", "kind is 'xxx"),
    "an id beyond the experts": ("record", ids([3, 8]), "row 0, layer 0: experts [3, 8]: the model has 8"),
    "an id of 30,000": ("record", ids([3, 30000]), "the model has 8"),
    "an id below -1": ("record", ids([3, 1], [-2, 1]), "row 0, layer 1: experts [-2, 1]: an id below -1"),
    "-1 beside an expert": ("record", ids([-1, 3]), "-1 beside experts"),
    "an expert twice": ("record", ids([3, 3]), "one of them twice"),
    "another top_k": ("record", IDS[..., :1].tolist(), "top-1, but the model routes to top-2"),
    "another model": ("record", np.tile(IDS, (1, 2, 1)).tolist(), "4 layers, but the model has 2"),
    "an object of lists": ("vllm", {"ids": IDS.tolist()}, "an object of ['ids'] (give prompt_routed_experts"),
    "an object of nothing": ("vllm_http", {}, "an object of [] (give prompt_routed_experts"),
    "an object of 1 MB": ("vllm_http", {"x" * 10**6: 1}, "an object of ['xxx"),
    "objects 500 deep": (
        "vllm",
        json.loads('{"routed_experts":' * 500 + "[]" + "}" * 500),
        "expert ids have the shape ()",
    ),
    "a prompt of another model": (
        "vllm",
        {"prompt_routed_experts": IDS[:2, :1].tolist(), "routed_experts": IDS.tolist()},
        "prompt_routed_experts and routed_experts differ in layers or top_k",
    ),
    "a prompt as text": ("vllm", {"prompt_routed_experts": "AAAA"}, "expert ids have the shape ()"),
    "base 85 that is none": ("prime_rl", {"data": "\u00e9", "shape": [1, 2, 2]}, "its data are base85 of int32"),
    "base 85 that overflows": ("prime_rl", {"data": "~~~~~", "shape": [1, 2, 2]}, "its data are base85 of int32"),
    "base 85 of another size": ("prime_rl", {"data": "00000", "shape": [4, 2, 2]}, "4 bytes, where 4 x 2 x 2 int32"),
    "another encoding": ("prime_rl", record(encoding="zstd"), "encoding is 'zstd' (give base64)"),
    "a row of zeros": ("record", ids([0, 0], [0, 0]), "row 0 is all zero in every layer, one of 1"),
    "a layer of zeros": ("record", [[[0, 0], [3, 1]]] * 4, "layer 0 is all zero in 4 rows"),
    "rows of another sequence": ("record", np.tile(IDS, (2, 1, 1))[:6].tolist(), "6 rows, but 4 of 5 input tokens"),
    "too few rows": ("record", IDS[:2].tolist(), "2 rows, but 4 of 5 input tokens"),
    "too many rows": ("record", np.tile(IDS, (3, 1, 1)).tolist(), "12 rows, but 4 of 5 input tokens"),
}


@pytest.mark.parametrize("name", TRACES)
def test_a_hostile_trace_is_refused(canary, name):
    kind, value, says = TRACES[name]
    value = value.replace("CANARY", str(canary)) if isinstance(value, str) else value
    refusal(lambda: align(decode(value, kind=kind, layers=2, top_k=2), SHAPE, len(TOKENS)), says)


def test_an_array_with_a_payload_is_never_unpickled(canary, tmp_path):
    """`np.load` would run it where it may: positive control."""
    data = npy(np.array([Payload(canary)], dtype=object), allow_pickle=True)
    refusal(lambda: decode(text(data), kind="vllm_http"), NO_ARRAY)
    np.load(
        io.BytesIO(npy(np.array([Payload(tmp_path / "fired")], dtype=object), allow_pickle=True)), allow_pickle=True
    )
    assert (tmp_path / "fired").is_dir()


# --- rollout files


def rollout(**changes) -> dict:
    good = {"tokens": TOKENS, "completion_mask": MASK, "logprobs": [-0.5, -1.5], "reward": 1.0, "group": "a"}
    return {key: value for key, value in {**good, "routing": record(), **changes}.items() if value is not None}


NO_TOKENS, NO_LOGPROBS = "'tokens' is no list of token ids", "'logprobs' is no list of log-probs"
ROLLOUTS = {
    "no tokens": (rollout(tokens=[]), NO_TOKENS),
    "tokens as text": (rollout(tokens="5 6 7"), NO_TOKENS),
    "tokens true": (rollout(tokens=[True] * 5), NO_TOKENS),
    "fractions of tokens": (rollout(tokens=[5.5] * 5), NO_TOKENS),
    "a token of 30 digits": (rollout(tokens=[5, 6, 7, 8, 10**30]), NO_TOKENS),
    "a token below 0": (rollout(tokens=[5, 6, 7, 8, -9]), "'tokens' holds an id outside of the model's"),
    "a token beyond the vocabulary": (rollout(tokens=[5, 6, 7, 8, 10**6]), "'tokens' holds an id outside"),
    "a mask of other numbers": (rollout(completion_mask=[0, 0, 0, 1, 2]), "'completion_mask' is no list of 0 and 1"),
    "a mask too short": (rollout(completion_mask=[0, 1]), "'completion_mask' has 2 entries for 5 tokens"),
    "logprobs NaN": (rollout(logprobs=[float("nan"), -1]), NO_LOGPROBS),
    "logprobs infinite": (rollout(logprobs=[-0.5, float("-inf")]), NO_LOGPROBS),
    "logprobs of 400 digits": (rollout(logprobs=[-(10**400), -1]), NO_LOGPROBS),
    "logprobs of -1e308": (rollout(logprobs=[-1e308, -1]), NO_LOGPROBS),
    "logprobs above 0": (rollout(logprobs=[0.5, -1]), NO_LOGPROBS),
    "logprobs too many": (rollout(logprobs=[-1.0] * 9), "'logprobs' has 9 entries for 2 completion tokens"),
    "a reward NaN": (rollout(reward=float("nan")), "'reward' is nan (write a finite number)"),
    "a reward infinite": (rollout(reward=float("inf")), "'reward' is inf (write a finite number)"),
    "a reward of 400 digits": (rollout(reward=10**400), "'reward' is 1000"),
    "an advantage of 1e300": (rollout(advantage=1e300), "'advantage' is 1e+300 (write a finite number)"),
    "a reward as text": (rollout(reward="1"), "'reward' is a string (write a number)"),
    "an unknown key": (rollout(__class__="x"), "'__class__' is not read in a rollout"),
    "a key of 1 MB": (rollout(**{"x" * 10**6: 1}), "is not read in a rollout"),
    "an image outside": (rollout(images=["../secret.png"]), "leaves the data root"),
    "an image of nothing": (rollout(images=["good.png"]), "'tokens' holds 0 image tokens, its 1 images make 4"),
    "routing as junk": (rollout(routing="!!"), "record"),
    "routing of an array of objects": (
        rollout(routing=text(npy(np.array([{}]), allow_pickle=True)), routing_format="vllm_http"),
        NO_ARRAY,
    ),
    "routing to no expert": (rollout(routing=ids([3, 99])), "the model has 8"),
    "routing of another format": (rollout(routing_format="pickle"), "kind is 'pickle' (one of"),
    "routing that starts at NaN": (rollout(routing_start=float("nan")), "start is nan"),
}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_a_hostile_rollout_is_named(stream, folder, name):
    value, says = ROLLOUTS[name]
    path = folder / "rollouts.jsonl"
    path.write_text(f"{json.dumps(rollout(advantage=1.0))}\n{json.dumps(value)}\n")
    refusal(lambda: next(iter(stream(path, Rollouts(SHAPE), batch=2))), f"{path}:2: ", says)


def test_they_are_skipped_and_listed_by_a_loading_process(stream, folder):
    path = folder / "rollouts.jsonl"
    values = [rollout(advantage=1.0), *(value for value, _ in ROLLOUTS.values())]
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    made = stream(path, Rollouts(SHAPE), batch=len(values), num_workers=1, on_bad_record="skip")
    [batch] = next(iter(made))
    assert int(batch.real_B.sum()) == 1 and len(made.skipped) == len(ROLLOUTS)


def test_good_traces_pass(stream, folder):
    """Positive control."""
    for kind, value in {"record": record(), "vllm_http": text(npy(IDS)), "vllm": IDS.tolist()}.items():
        assert align(decode(value, kind=kind), SHAPE, 5)[:4].tolist() == IDS.tolist()
    (folder / "rollouts.jsonl").write_text(json.dumps(rollout(advantage=1.0)))
    [batch] = next(iter(stream(folder / "rollouts.jsonl", Rollouts(SHAPE))))
    assert batch.inputs["routing"].shape == (1, 5, 2, 2)
