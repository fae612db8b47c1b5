"""Every form that engines and files give routing in: hand-made examples, round trips, and what is refused."""

import base64
import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from ds_moe.errors import UserError
from ds_moe.replay.traces import FORMATS, RoutingTrace, decode, to_record

IDS = [[[0, 0], [3, 1]], [[0, 0], [2, 7]]]  # two rows, a dense layer and one with experts, top-2
SGLANG = "AAAAAAAAAAADAAAAAQAAAAAAAAAAAAAAAgAAAAcAAAA="  # the same, as sglang sends it


def encoded(raw):
    return base64.b64encode(raw).decode()


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return encoded(file.getvalue())


def prime(ids=IDS, dtype="uint8", **changed):
    array = np.array(ids, dtype)
    return {"data": encoded(array.tobytes()), "shape": list(array.shape), "start": 0, "dtype": dtype} | changed


FORMS = {
    "record": [IDS, prime(), np.array(IDS)],
    "vllm": [np.array(IDS, np.uint8), np.array(IDS, np.uint16), IDS],
    "vllm_http": [npy(np.array(IDS, np.uint8)), npy(np.array(IDS, np.uint16)), npy(np.asfortranarray(IDS)).encode()],
    "sglang": [SGLANG, SGLANG.encode()],
    "prime_rl": [prime(), prime(dtype="int32"), prime() | {"data": memoryview(prime()["data"].encode())}],
    "megatron": [np.array(IDS, np.int64), IDS],
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_form_gives_the_same_trace(kind):
    for value in FORMS[kind]:
        trace = decode(value, kind=kind, layers=2, top_k=2)
        assert trace == RoutingTrace(IDS)
        assert trace.ids.dtype == np.int16 and trace.ids.tolist() == IDS and trace.source == kind
        if not isinstance(value, dict):
            assert decode(value, kind=kind, layers=2, top_k=2, start=5).start == 5
    assert decode(prime(start=5), kind="prime_rl") == decode(prime(start=5), kind="prime_rl", start=5)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "int64"])
def test_ids_beyond_uint8(dtype):
    ids = np.array([[[511, 256]], [[255, 32767]]], dtype)
    raw = encoded(ids.astype("<i4").tobytes())
    values = {"vllm": ids, "vllm_http": npy(ids), "sglang": raw, "prime_rl": prime(ids, dtype), "megatron": ids}
    for kind, value in values.items():
        assert decode(value, kind=kind, layers=1, top_k=2).ids.tolist() == ids.tolist()


def test_padding_rows_of_sglang_stay():
    ids = np.array([[[3, 1]], [[-1, -1]]], "<i4")
    assert decode(encoded(ids.tobytes()), kind="sglang", layers=1, top_k=2).ids.tolist() == ids.tolist()


def test_equality_is_of_routing_and_start_not_of_source():
    trace = RoutingTrace(IDS, 3, source="here")
    assert trace == RoutingTrace(np.array(IDS), 3, source="there")
    assert trace != RoutingTrace(IDS, 4) and trace != RoutingTrace(IDS[:1], 3)
    assert trace != IDS


def pickled(array):
    return npy(array, allow_pickle=True)


class Exploit:
    def __reduce__(self):
        return pytest.fail, ("a pickle ran",)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (IDS, "vlm", "kind is 'vlm' .one of record, vllm"),
        (IDS, ["vllm"], "kind is .'vllm'. .one of record, vllm"),
        ([[[1, 2]], [[1]]], "record", "record: expert ids are no array of numbers"),
        ([[1, 2]], "record", r"record: expert ids have the shape \(1, 2\)"),
        ([[[]]], "record", r"shape \(1, 1, 0\)"),
        ([[[0.5, 1.0]]], "record", "type float64"),
        ([[[True, False]]], "record", "type bool"),
        ([[[None, 1]]], "record", "type object"),
        ([[["1", "2"]]], "vllm", "vllm: expert ids have the type <U1"),
        ([[[32768, 1]]], "megatron", "megatron: expert id 32768 does not fit 16 bits"),
        ([[[-40000, 1]]], "vllm", "expert id -40000 does not fit"),
        (np.full((1, 1, 2), 2**63, np.uint64), "vllm", "expert id 9223372036854775808"),
        (5, "vllm_http", "vllm_http: int where base64"),
        ("not base64!", "vllm_http", "vllm_http: not base64"),
        ("!" + SGLANG, "sglang", "sglang: not base64"),
        ("ä", "sglang", "sglang: not base64"),
        ("", "vllm_http", "vllm_http: no .npy array"),
        (SGLANG, "vllm_http", "vllm_http: no .npy array"),
        (encoded(b"PK\x03\x04junk"), "vllm_http", "vllm_http: no .npy array"),
        (npy(np.array(IDS))[:-24], "vllm_http", "vllm_http: no .npy array"),
        (npy(np.array(IDS) / 2), "vllm_http", "vllm_http: expert ids have the type float64"),
        (pickled(np.array([Exploit()], object)), "vllm_http", "Object arrays cannot be loaded"),
        (encoded(pickle.dumps(Exploit())), "vllm_http", "vllm_http: no .npy array: the magic string"),
        (SGLANG[:-8], "sglang", "sglang: 27 bytes are no whole rows of 2 layers x top-2 int32"),
        (SGLANG, "prime_rl", "prime_rl: str .give an object"),
        ({"data": ""}, "prime_rl", "prime_rl: data .give an object"),
        ({"data": prime()["data"], "shape": [2, 2, 2]}, "prime_rl", "9 bytes, where 2 x 2 x 2 int32 are 32"),
        ({"data": 5, "shape": [2, 2, 2]}, "prime_rl", "without a dtype its data are base85 of int32"),
        (prime(encoding="gzip"), "prime_rl", "encoding is 'gzip' .give base64"),
        ({"routed_experts": None}, "vllm", r"vllm: an object of \[\] .give prompt_routed_experts and routed_experts"),
        ({"routed_experts": IDS, "shape": 1}, "vllm_http", r"an object of \['routed_experts', 'shape'\]"),
        ({"prompt_routed_experts": IDS, "routed_experts": [[[1]]]}, "vllm", "differ in layers or top_k"),
        ({"routed_experts": {"routed_experts": IDS}}, "vllm", "expert ids have the shape|no array of numbers"),
        (prime(dtype="uint8") | {"dtype": "object"}, "prime_rl", "dtype is 'object' .one of uint8"),
        (prime(dtype="uint8") | {"dtype": "float32"}, "prime_rl", "dtype is 'float32'"),
        (prime(dtype="int16") | {"dtype": "uint8"}, "prime_rl", "16 bytes, where 2 x 2 x 2 uint8 are 8"),
        (prime(shape=[2, 2]), "prime_rl", r"shape is \[2, 2\]"),
        (prime(shape=[2, 2, -2]), "prime_rl", r"shape is \[2, 2, -2\]"),
        (prime(shape=None), "prime_rl", "shape is None"),
        (prime(shape="222"), "prime_rl", "shape is '222'"),
        (prime(start=-1), "prime_rl", "start is -1 .give the index"),
        (prime(start=None), "record", "start is None"),
        (prime(start=True), "record", "start is True"),
    ],
)
def test_refused(value, kind, message):
    with pytest.raises(UserError, match=message) as refusal:
        decode(value, kind=kind, layers=2, top_k=2)
    assert "\n" not in str(refusal.value)


def test_the_pickles_of_these_tests_would_run():
    """Negative control: a reader that allows pickles runs them."""
    with pytest.raises(pytest.fail.Exception, match="a pickle ran"):
        np.load(io.BytesIO(base64.b64decode(pickled(np.array([Exploit()], object)))), allow_pickle=True)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (IDS, "vllm_http"),  # vLLM 0.21
        ({"prompt_routed_experts": IDS[:1], "routed_experts": IDS[1:]}, "vllm_http"),
        ({"prompt_routed_experts": npy(np.array(IDS[:1], np.uint8)), "routed_experts": IDS[1:]}, "vllm_http"),
        ({"prompt_routed_experts": IDS, "routed_experts": []}, "vllm"),  # a completion of one token
        ({"prompt_routed_experts": None, "routed_experts": IDS}, "vllm"),  # Arrow fills in None
        (prime() | {"encoding": "base64"}, "prime_rl"),
        ({key: value for key, value in prime().items() if key != "start"}, "prime_rl"),
        (prime(start=None), "prime_rl"),
        ({"data": base64.b85encode(np.array(IDS, "<i4").tobytes()).decode(), "shape": [2, 2, 2]}, "prime_rl"),
    ],
)
def test_what_older_versions_of_the_engines_sent(value, kind):
    assert decode(value, kind=kind, layers=2, top_k=2) == RoutingTrace(IDS)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_list_without_rows_has_the_shape_of_the_model(kind):
    assert decode([], kind=kind, layers=3, top_k=2, start=4) == RoutingTrace(np.zeros((0, 3, 2), int), 4)


def test_sglang_needs_its_shape():
    with pytest.raises(UserError, match="sglang: layers is None, top_k is 2 .give both"):
        decode(SGLANG, kind="sglang", top_k=2)


def test_two_starts():
    with pytest.raises(UserError, match="start is 3, but the value itself says 5"):
        decode(prime(start=5), kind="prime_rl", start=3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(raw=st.binary(max_size=200), kind=st.sampled_from(["vllm_http", "sglang"]), header=st.booleans())
def test_any_bytes_are_a_trace_or_one_line(raw, kind, header):
    text = encoded((b"\x93NUMPY\x01\x00" if header else b"") + raw)
    try:
        assert decode(text, kind=kind, layers=1, top_k=2).ids.dtype == np.int16
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith(kind)


traces = st.builds(
    RoutingTrace,
    ids=st_np.arrays(np.int16, st_np.array_shapes(min_dims=3, max_dims=3, max_side=5), elements=st.integers(-1, 32767)),
    start=st.integers(0, 10**6),
    source=st.text(max_size=8),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(trace=traces)
def test_records_come_back_from_json(trace):
    record = json.loads(json.dumps(to_record(trace)))
    assert decode(record, kind="record") == decode(record, kind="prime_rl") == trace
    assert decode(trace.ids.tolist(), kind="record", start=trace.start) == trace


def test_records_come_back_from_parquet(tmp_path):
    trace = RoutingTrace(IDS, 2)
    table = pa.Table.from_pylist([{"routing": to_record(trace), "lists": IDS}])
    pq.write_table(table, tmp_path / "rollouts.parquet")
    [row] = pq.read_table(tmp_path / "rollouts.parquet").to_pylist()
    assert decode(row["routing"], kind="record") == trace
    assert decode(row["lists"], kind="record").ids.tolist() == IDS
