"""Traces against the trainer's tokens and layers: the right experts at each place, and one line for what cannot fit."""

import base64
import time

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3VLConfig, Qwen3VLMoeConfig

from ds_moe.errors import UserError
from ds_moe.replay.align import RoutingShape, align
from ds_moe.replay.traces import RoutingTrace, decode

SHAPE = RoutingShape(layers=3, moe_layers=(1, 2), experts=8, top_k=2)
WIDE = RoutingShape(layers=2, moe_layers=(0, 1), experts=512, top_k=4)
NARROW = RoutingShape(layers=2, moe_layers=(0, 1), experts=8, top_k=1)


def random_ids(rows, shape=SHAPE, every=True, seed=0):
    """Distinct experts (rows, layers, K); `every` layer of the decoder, dense ones zero, or only those with experts."""
    rng = np.random.default_rng(seed)
    draws = rng.random((rows, len(shape.moe_layers), shape.experts)).argsort(-1)[..., : shape.top_k]
    if not every:
        return draws
    ids = np.zeros((rows, shape.layers, shape.top_k), np.int64)
    ids[:, shape.moe_layers] = draws
    return ids


def oracle(trace, shape, tokens):
    """`align` token by token and layer by layer."""
    aligned = torch.full((tokens, len(shape.moe_layers), shape.top_k), -1, dtype=torch.int16)
    every = trace.ids.shape[1] == shape.layers
    for token in range(tokens):
        row = token - trace.start
        if 0 <= row < len(trace.ids):
            for place, layer in enumerate(shape.moe_layers):
                for k in range(shape.top_k):
                    aligned[token, place, k] = int(trace.ids[row, layer if every else place, k])
    return aligned


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("start", [0, 4, 9])
@pytest.mark.parametrize("shape", [SHAPE, WIDE, NARROW], ids=["dense layer", "512 experts", "top-1"])
def test_each_token_gets_its_row(every, start, shape):
    trace = RoutingTrace(random_ids(10 - 1 - start, shape, every), start)
    aligned_TLK = align(trace, shape, 10)
    assert aligned_TLK.dtype == torch.int16 and aligned_TLK.is_contiguous()
    assert torch.equal(aligned_TLK, oracle(trace, shape, 10))
    assert (aligned_TLK[:start] == -1).all() and (aligned_TLK[-1] == -1).all() and (aligned_TLK[start:-1] >= 0).all()


def test_one_token_has_no_row():
    assert (align(RoutingTrace(np.zeros((0, 3, 2), int)), SHAPE, 1) == -1).all()


def test_experts_beyond_uint8_arrive():
    ids = random_ids(20, WIDE)
    assert ids.max() > 256
    assert align(RoutingTrace(ids.astype(np.uint16)), WIDE, 21)[:-1].tolist() == ids.tolist()


def test_rows_of_padding_are_live():
    ids = random_ids(5)
    ids[3] = -1
    aligned_TLK = align(from_sglang_array(ids), SHAPE, 6)
    assert (aligned_TLK == -1).all((1, 2)).tolist() == [False, False, False, True, False, True]
    ids[1, 2] = -1  # one layer of a row
    assert (align(RoutingTrace(ids), SHAPE, 6)[1] == -1).all(-1).tolist() == [False, True]


def from_sglang_array(ids):
    raw = base64.b64encode(ids.astype("<i4").tobytes())
    return decode(raw, kind="sglang", layers=ids.shape[1], top_k=ids.shape[2])


def moe_config(**settings):
    return Qwen3MoeConfig(num_hidden_layers=4, num_experts=8, num_experts_per_tok=2, **settings)


def test_a_dense_layer_shifts_no_other():
    shape = RoutingShape.of(moe_config(mlp_only_layers=[0]))
    assert shape == RoutingShape(4, (1, 2, 3), 8, 2)
    ids = random_ids(6, shape)
    every, only = align(RoutingTrace(ids), shape, 7), align(RoutingTrace(ids[:, 1:]), shape, 7)
    assert torch.equal(every, only)
    assert every[:-1].tolist() == ids[:, 1:].tolist()
    # Negative control: taken from the first layer on, as others did, every layer would replay the one before it.
    assert not torch.equal(every[:-1], torch.from_numpy(ids[:, :3]).to(torch.int16))
    with pytest.raises(UserError, match="layer 0: expert . in a dense layer"):
        align(RoutingTrace(np.roll(ids, -1, axis=1)), shape, 7)


def test_shape_of_a_config():
    assert RoutingShape.of(moe_config()).moe_layers == (0, 1, 2, 3)
    assert RoutingShape.of(moe_config(decoder_sparse_step=2)).moe_layers == (1, 3)
    assert RoutingShape.of(moe_config(decoder_sparse_step=2, mlp_only_layers=[1])).moe_layers == (3,)
    text = {"num_hidden_layers": 2, "num_experts": 512, "num_experts_per_tok": 4}
    assert RoutingShape.of(Qwen3VLMoeConfig(text_config=text)) == WIDE
    bare = moe_config()
    del bare.decoder_sparse_step, bare.mlp_only_layers
    assert RoutingShape.of(bare).moe_layers == (0, 1, 2, 3)
    for dense in (Qwen3VLConfig(), moe_config(mlp_only_layers=[0, 1, 2, 3])):
        with pytest.raises(UserError, match="model without MoE layers"):
            RoutingShape.of(dense)


def changed(at, value, rows=9, **options):
    ids = random_ids(rows, **options)
    ids[at] = value
    return ids


@pytest.mark.parametrize(
    ("ids", "shape", "message"),
    [
        (random_ids(9)[:, [0, 1, 2, 2]], SHAPE, "4 layers, but the model has 3, 2 of them with experts"),
        (random_ids(9)[:, :1], SHAPE, "1 layers, but the model has 3"),
        (random_ids(9)[..., :1], SHAPE, "top-1, but the model routes to top-2"),
        (changed((4, 0, 1), 5), SHAPE, "row 4, layer 0: expert 5 in a dense layer .mlp_only_layers"),
        (changed((4, 2, 1), 8), SHAPE, r"row 4, layer 2: experts \[\d, 8\]: the model has 8"),
        (changed((4, 1, 1), 8, every=False), SHAPE, r"row 4, layer 2: experts \[\d, 8\]: the model has 8"),
        (changed((2, 0, 3), 512, shape=WIDE), WIDE, r"row 2, layer 0: experts .* 512\]: the model has 512"),
        (changed((4, 1, 0), -2), SHAPE, r"row 4, layer 1: experts \[-2, \d\]: an id below -1"),
        (changed((4, 1, 0), -1), SHAPE, r"row 4, layer 1: experts \[-1, \d\]: -1 beside experts"),
        (changed((4, 1, 1), -1), SHAPE, r"row 4, layer 1: experts \[\d, -1\]: -1 beside experts"),
        (changed((4, 1), 3), SHAPE, r"row 4, layer 1: experts \[3, 3\]: one of them twice"),
        (changed((4, 1), [9, 5, 300, 9], shape=WIDE), WIDE, "row 4, layer 1: .*: one of them twice"),
        (changed((slice(None), 2), 0), SHAPE, "layer 2 is all zero in 9 rows .the engine recorded nothing"),
        (changed((slice(None), 1), 0, every=False), SHAPE, "layer 2 is all zero in 9 rows"),
        (changed((slice(None), 1), 0, shape=NARROW), NARROW, "layer 1 is all zero in 9 rows"),
        (random_ids(10), SHAPE, "10 rows, but 9 of 10 input tokens from 0 on have one: the last token has none"),
        (random_ids(11), SHAPE, "11 rows, but 9 of 10 .*give the input tokens"),
        (random_ids(8), SHAPE, "8 rows, but 9 of 10 .*short: live leaves the rest"),
    ],
)
def test_refused(ids, shape, message):
    trace = RoutingTrace(ids, source="vllm")
    with pytest.raises(UserError, match="^vllm: " + message) as refusal:
        align(trace, shape, 10)
    assert "\n" not in str(refusal.value)


def test_all_zero_rows_beside_padding():
    ids = changed((slice(None), 1), 0)
    ids[2:] = -1
    with pytest.raises(UserError, match="layer 1 is all zero in 2 rows"):
        align(RoutingTrace(ids), SHAPE, 10)
    assert (align(RoutingTrace(np.full_like(ids, -1)), SHAPE, 10) == -1).all()


def test_few_tokens_may_all_choose_expert_zero_under_top_1():
    assert (align(RoutingTrace(np.zeros((7, 2, 1), int)), NARROW, 8)[:-1] == 0).all()


def test_a_start_behind_the_sequence():
    with pytest.raises(UserError, match="starts at token 10 of 10 input tokens"):
        align(RoutingTrace(random_ids(1)[:0], 10), SHAPE, 10)


def test_a_row_for_the_last_token_is_dropped_on_request():
    ids = random_ids(6)
    dropped = align(RoutingTrace(ids, 4), SHAPE, 10, extra_row="drop")
    assert torch.equal(dropped, align(RoutingTrace(ids[:-1], 4), SHAPE, 10))
    ids[-1] = 100  # the row that is not used is not checked
    assert torch.equal(align(RoutingTrace(ids, 4), SHAPE, 10, extra_row="drop"), dropped)
    with pytest.raises(UserError, match="7 rows, but 5 of 10"):
        align(RoutingTrace(random_ids(7), 4), SHAPE, 10, extra_row="drop")


@pytest.mark.parametrize("filler", [0, -1])
@pytest.mark.parametrize("more", [1, 3])
@pytest.mark.parametrize("shape", [SHAPE, NARROW], ids=["top-2", "top-1"])
def test_filler_at_the_end_is_no_row(filler, more, shape):
    """Clients fill up with zeros to one row a token, or to the longest sequence; sglang pads with -1."""
    ids = random_ids(9, shape)
    ids[0] = random_ids(1, shape, seed=5) if shape is SHAPE else 1
    padded = np.concatenate([ids, np.full((more, *ids.shape[1:]), filler)])
    assert torch.equal(align(RoutingTrace(padded), shape, 10), align(RoutingTrace(ids), shape, 10))


def test_a_row_of_zeros_before_the_end_is_no_routing():
    ids = random_ids(9)
    ids[3] = ids[5] = 0
    with pytest.raises(UserError, match="row 3 is all zero in every layer, one of 2 .the engine recorded nothing"):
        align(RoutingTrace(ids), SHAPE, 10)
    ids[[3, 5]] = -1  # what the message says
    assert (align(RoutingTrace(ids), SHAPE, 10)[[3, 5]] == -1).all()


def test_many_rows_of_zeros_under_top_1_are_no_routing():
    """As of a prompt whose rows a prefix cache has lost."""
    ids = np.ones((20, 2, 1), int)
    ids[:7] = 0
    assert (align(RoutingTrace(ids), NARROW, 21)[:7] == 0).all()
    ids[:8] = 0
    with pytest.raises(UserError, match="row 0 is all zero in every layer, one of 8"):
        align(RoutingTrace(ids), NARROW, 21)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_ids_of_too_few_bits_have_wrapped(dtype):
    ids = (random_ids(9, WIDE) % 100).astype(dtype)
    ids[...] = np.arange(4)
    with pytest.raises(UserError, match="ids of at most (255|127), but the model has 512 experts"):
        align(RoutingTrace(ids), WIDE, 10)
    align(RoutingTrace(ids.astype(np.uint16)), WIDE, 10)


def test_missing_rows_are_live_on_request():
    trace = RoutingTrace(random_ids(4), 2)
    aligned_TLK = align(trace, SHAPE, 10, short="live")
    assert torch.equal(aligned_TLK, oracle(trace, SHAPE, 10))
    assert (aligned_TLK == -1).all((1, 2)).tolist() == [True] * 2 + [False] * 4 + [True] * 4


def test_truncating_is_slicing():
    ids = random_ids(9)
    aligned_TLK = align(RoutingTrace(ids), SHAPE, 10)
    assert torch.equal(aligned_TLK[:6][:-1], align(RoutingTrace(ids[:5]), SHAPE, 6)[:-1])
    assert torch.equal(aligned_TLK[-6:], align(RoutingTrace(ids[4:]), SHAPE, 6))


def test_a_long_trace_takes_moments():
    """4096 tokens x 48 layers x top-8: a loop over tokens in Python would take far longer."""
    shape = RoutingShape(48, tuple(range(48)), 128, 8)
    ids = (np.arange(8) * 16 + np.random.default_rng(0).integers(16, size=(4095, 48, 8))).astype(np.uint8)
    began = time.process_time()
    align(RoutingTrace(ids), shape, 4096)
    assert time.process_time() - began < 1  # 0.02
