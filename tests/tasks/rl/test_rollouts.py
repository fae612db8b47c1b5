"""Rollout records: what is read, what is refused, how advantages are filled in and how micro-batches look."""

import base64
import json
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_moe.data.batch import NO_LOSS
from ds_moe.data.encode import filler
from ds_moe.data.record_kind import CHAT
from ds_moe.data.stream import TrainStream
from ds_moe.errors import UserError
from ds_moe.models.processor import tiny_processor
from ds_moe.replay.align import RoutingShape
from ds_moe.replay.traces import RoutingTrace, to_record
from ds_moe.tasks.rl.rollout_record import parse_rollout
from ds_moe.tasks.rl.rollouts import Rollouts

SHAPE = RoutingShape(layers=2, moe_layers=(0, 1), experts=8, top_k=2)
PROMPT, COMPLETION = [5, 6, 7], [8, 9]
VIDEO = tiny_processor().video_token_id


def rollout(**changes):
    tokens = PROMPT + COMPLETION
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(8), (len(tokens) - 1, 2, 1)), axis=-1)[..., :2]
    record = {
        "tokens": tokens,
        "completion_mask": [0, 0, 0, 1, 1],
        "logprobs": [-0.5, -1.5],
        "reward": 1.0,
        "group": "a",
        "routing": to_record(RoutingTrace(ids)),
    }
    return {key: value for key, value in {**record, **changes}.items() if value is not None}


@pytest.fixture
def first_step(write_jsonl, run_config, processor):
    """first_step(records, ...) -> the micro-batch of one step that takes them all."""

    def step(records, shape=SHAPE, **options):
        path = write_jsonl(records)
        size = len(records)
        config = run_config(path, {"shuffle": False, "length_grouping": False}, micro_batch_size=size)
        config.train.global_batch_size = size
        stream = TrainStream(config, processor, rank=0, world_size=1, record_kind=Rollouts(shape, **options))
        [[batch]] = islice(stream, 1)
        return batch

    return step


def test_a_micro_batch_of_rollouts(first_step):
    longer = rollout(tokens=[5, 6, 7, 8, 9, 10], completion_mask=[0, 0, 0, 0, 0, 1], logprobs=[-2.0], routing=None)
    batch = first_step([rollout(), longer])
    assert "labels" not in batch.inputs
    assert batch.inputs["input_ids"][0].tolist()[:5] == PROMPT + COMPLETION
    assert batch.completion_BS.tolist() == [[False] * 3 + [True] * 2 + [False], [False] * 5 + [True]]
    assert batch.engine_BS.tolist() == [[0, 0, 0, -0.5, -1.5, 0], [0, 0, 0, 0, 0, -2]]
    routing = batch.inputs["routing"]
    assert routing.shape == (2, 6, 2, 2) and routing.dtype == torch.int16
    assert (routing[0, :4] >= 0).all()
    assert (routing[0, 4:] == -1).all() and (routing[1] == -1).all()  # the last token, padding, a record without


def test_advantages_are_the_groups_or_the_records_own(first_step):
    rewards = [("a", 1.0), ("a", 0.0), ("a", 0.0), ("b", 1.0)]
    records = [rollout(group=group, reward=reward) for group, reward in rewards] + [rollout(advantage=0.25)]
    batch = first_step(records, normalize_std=False)
    expected = [1 - 0.5, -0.5, -0.5, 0.0, 0.25]  # the fifth belongs to group a, too, with reward 1
    assert batch.advantage_B.tolist() == expected and batch.reward_B.tolist() == [1, 0, 0, 1, 1]
    scaled = first_step(records).advantage_B
    deviation = np.std([1, 0, 0, 1], ddof=1)
    np.testing.assert_allclose(scaled[:3], np.array([0.5, -0.5, -0.5]) / deviation, rtol=1e-5)


def test_messages_give_the_completion_of_their_last_answer(first_step, processor):
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    again = [*messages, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "3"}]
    record = rollout(tokens=None, completion_mask=None, routing=None, messages=again, logprobs=[-1.0, -2.0])
    batch = first_step([record], shape=None)
    completed = batch.inputs["input_ids"][batch.completion_BS]
    assert processor.tokenizer.decode(completed) == "3<|im_end|>"
    assert batch.engine_BS[batch.completion_BS].tolist() == [-1.0, -2.0]


def test_the_routing_of_messages_ends_with_the_completion(first_step, processor):
    """Templates write on behind the last answer, which the engine has not seen."""
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    plain = rollout(tokens=None, completion_mask=None, routing=None, messages=messages, logprobs=[-1.0, -2.0])
    mask = first_step([plain], shape=None).completion_BS[0]
    seen = int(mask.nonzero()[-1]) + 1
    assert seen < len(mask)
    ids = np.tile([3, 1], (seen - 1, 2, 1))
    routing = first_step([{**plain, "routing": to_record(RoutingTrace(ids))}]).inputs["routing"][0]
    np.testing.assert_array_equal(routing[: seen - 1], ids)
    assert (routing[seen - 1 :] == -1).all()


def test_packed_rollouts_hold_what_padded_ones_hold(processor):
    record_kind = Rollouts(SHAPE, need_reference=True)
    longer = rollout(tokens=[5, 6, 7, 8, 9, 10], completion_mask=[0, 0, 0, 0, 0, 1], logprobs=[-2.0], routing=None)
    records = [rollout(reference_logprobs=[-3.0, -4.0]), {**longer, "reference_logprobs": [-5.0]}]
    encoded = [record_kind.encode(record_kind.parse(record, "here", Path(".")), processor, 99, 1) for record in records]
    encoded.insert(1, filler(processor))
    packed, rows = (record_kind.collate(encoded, processor, packed=packed) for packed in (True, False))
    real = rows.inputs["attention_mask"].bool()
    for name in ("completion_BS", "engine_BS", "reference_BS"):
        assert getattr(packed, name).shape == (3, 6) and getattr(packed, name).equal(getattr(rows, name))
    assert packed.labels.shape == (1, 12) and packed.labels[0].equal(rows.labels[real])
    assert rows.labels.equal(rows.inputs["input_ids"].where(rows.completion_BS, NO_LOSS))
    assert packed.engine_BS.count_nonzero() == 3
    assert packed.inputs["routing"].shape == (1, 12, 2, 2) and packed.inputs["routing"].dtype == torch.int16
    assert packed.inputs["routing"][0].equal(rows.inputs["routing"][real])
    assert (packed.inputs["routing"] >= 0).any() and packed.reward_B[[0, 2]].tolist() == [1, 1]


def test_a_file_without_any_routing_is_refused_where_it_is_to_be_replayed(first_step):
    with pytest.raises(UserError, match="not one rollout has a 'routing' to replay"):
        first_step([rollout(routing=None), rollout(routing=None)])
    assert "routing" not in first_step([rollout(routing=None)], shape=None).inputs


def test_a_reward_that_is_not_known_is_no_zero(first_step):
    records = [rollout(), rollout(), rollout(reward=None, advantage=0.5)]
    assert first_step(records).advantage_B.tolist() == [0, 0, 0.5]


def test_kinds_of_records_travel_to_data_workers(write_jsonl, run_config, processor):
    for record_kind in (Rollouts(SHAPE, need_reference=True), CHAT):
        assert pickle.loads(pickle.dumps(record_kind)).remember(None if record_kind is CHAT else parsed()) is not False


def tensors(batch):
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def parsed():
    return parse_rollout(rollout(), "here", Path("."))


def test_a_dense_model_reads_no_routing_and_a_filler_completes_nothing(write_jsonl, run_config, processor):
    config = run_config(write_jsonl([rollout()]), micro_batch_size=2, global_batch_size=2)
    stream = TrainStream(config, processor, rank=0, world_size=1, record_kind=Rollouts(None))
    [[batch]] = islice(stream, 1)
    assert "routing" not in batch.inputs and batch.real_B.tolist() == [True, False]
    assert batch.completion_BS.any(1).tolist() == [True, False] and batch.advantage_B[1] == 0


def test_reference_logprobs_are_read_where_they_are_used(first_step, processor):
    record = rollout(reference_logprobs=[-3.0, -4.0])
    assert first_step([record]).reference_BS is None
    batch = first_step([record], need_reference=True)
    assert batch.reference_BS.tolist() == [[0, 0, 0, -3, -4]]
    record_kind = Rollouts(SHAPE, need_reference=True)
    fillers = record_kind.collate([filler(processor)], processor)  # on every rank the same keys, whatever its share
    assert fillers.inputs.keys() == batch.inputs.keys() and fillers.reference_BS is not None


def test_parquet_brings_the_same_micro_batch(first_step, folder, run_config, processor):
    from datasets import Dataset

    records = [rollout(), rollout(routing=None, reward=0.0)]
    Dataset.from_list(records).to_parquet(str(folder / "rollouts.parquet"))
    config = run_config(folder / "rollouts.parquet", {"shuffle": False, "length_grouping": False})
    config.train.global_batch_size = 2
    stream = TrainStream(config, processor, rank=0, world_size=1, record_kind=Rollouts(SHAPE))
    [[batch]] = islice(stream, 1)
    expected = first_step(records)
    own, given = ({**one.inputs, **tensors(one)} for one in (batch, expected))
    assert own.keys() == given.keys() and all(torch.equal(own[key], given[key]) for key in given)


@pytest.mark.parametrize("name", ["vllm", "sglang", "megatron"])
def test_the_routing_of_an_engine_is_read_as_it_came(first_step, name):
    ids = np.random.default_rng(1).permuted(np.tile(np.arange(8), (4, 2, 1)), axis=-1)[..., :2]
    raw = base64.b64encode(ids.astype("<i4").tobytes()).decode() if name == "sglang" else ids.tolist()
    batch = first_step([rollout(routing=raw, routing_format=name)])
    np.testing.assert_array_equal(batch.inputs["routing"][0, :4], ids)


def of_engine(rows: int, seed: int = 1) -> list:
    """Nested lists of so many rows."""
    return np.random.default_rng(seed).permuted(np.tile(np.arange(8), (rows, 2, 1)), axis=-1)[..., :2].tolist()


ZEROS = [[[0, 0], [0, 0]]]
ONE_TOKEN = {"completion_mask": [0, 0, 0, 0, 1], "logprobs": [-0.5]}
READ = {  # a record's keys -> the first input token that is replayed, and how many are
    "one token and no row, of the completion alone": ({"routing": [], "routing_start": 4, **ONE_TOKEN}, 0, 0),
    "one token and no row": ({"routing": [], **ONE_TOKEN}, 0, 0),
    "one token and no row, of vLLM": ({"routing": [], "routing_format": "vllm_http", **ONE_TOKEN}, 0, 0),
    "one token, in two parts": (
        {
            "routing": {"prompt_routed_experts": of_engine(4), "routed_experts": []},
            "routing_format": "vllm_http",
            **ONE_TOKEN,
        },
        0,
        4,
    ),
    "two parts": (
        {
            "routing": {"prompt_routed_experts": of_engine(4)[:3], "routed_experts": of_engine(4)[3:]},
            "routing_format": "vllm",
        },
        0,
        4,
    ),
    "the completion's part alone": ({"routing": of_engine(4)[:1], "routing_format": "vllm"}, 3, 1),
    "the completion's part alone, filled up": ({"routing": of_engine(4)[:1] + ZEROS, "routing_format": "vllm"}, 3, 1),
    "a zero row for the last token": ({"routing": of_engine(4) + ZEROS}, 0, 4),
    "a row too many, as the record says": ({"routing": of_engine(5), "extra_row": "drop"}, 0, 4),
    "too few rows, as the record says": ({"routing": of_engine(4)[:2], "short": "live"}, 0, 2),
}


@pytest.mark.parametrize("name", READ)
def test_rows_that_a_record_explains_are_read(first_step, name):
    changes, first, rows = READ[name]
    routing = first_step([rollout(**changes)]).inputs["routing"][0, :5]
    assert (routing >= 0).all((1, 2)).tolist() == [first <= token < first + rows for token in range(5)]
    np.testing.assert_array_equal(routing[first : first + rows], np.array(of_engine(5))[:rows].reshape(rows, 2, 2))


ONE_TOO_MANY = to_record(RoutingTrace(np.tile([0, 1], (5, 2, 1))))
BAD = {
    "no tokens": ({"tokens": None}, "neither 'tokens' nor 'messages'"),
    "both": ({"messages": []}, "both 'tokens' and 'messages'"),
    "a mask of messages": ({"tokens": None, "messages": []}, "'completion_mask' beside 'messages'"),
    "unknown key": ({"rewards": 1}, "'rewards' is not read in a rollout"),
    "tokens of text": ({"tokens": ["a"] * 5}, "'tokens' is no list of token ids"),
    "a mask too short": ({"completion_mask": [0, 1]}, "2 entries for 5 tokens"),
    "a mask of 2": ({"completion_mask": [0, 0, 0, 1, 2]}, "no list of 0 and 1"),
    "no completion": ({"completion_mask": [0] * 5}, "is 0 everywhere"),
    "no prompt": ({"completion_mask": [1] * 5, "logprobs": [-1.0] * 5}, "starts with the first token"),
    "no logprobs": ({"logprobs": None}, "has no 'logprobs'"),
    "a log-prob above 0": ({"logprobs": [0.5, -1.0]}, "no list of log-probs"),
    "a log-prob too few": ({"logprobs": [-1.0]}, "1 entries for 2 completion tokens"),
    "no reward": ({"reward": None}, "no 'advantage', nor 'reward' and 'group'"),
    "no group": ({"group": None}, "no 'advantage', nor 'reward' and 'group'"),
    "a reward in words": ({"reward": "good"}, "'reward' is a string"),
    "an id beyond the vocabulary": ({"tokens": [5, 6, 7, 8, 10**6]}, "outside of the model's"),
    "a missing image": ({"images": ["none.png"]}, "missing image 'none.png'"),
    "an image without its tokens": ({"images": ["a.png"]}, "'tokens' holds 0 image tokens"),
    "a token of videos": ({"tokens": [5, 6, 7, VIDEO, 9]}, "'tokens' holds 1 image tokens, its 0 images make 0"),
    "a routing of one row too many": ({"routing": ONE_TOO_MANY}, "rows"),
    "rows of a completion that may be another's": ({"routing": of_engine(4)[:1]}, "1 rows, but 4 of 5 input tokens"),
    "an advice of the errors, misread": ({"extra_row": "live"}, "'extra_row' is 'live' (write refuse or drop)"),
    "a choice that is a list": ({"short": ["live"]}, "'short' is ['live'] (write refuse or live)"),
    "a choice alone": ({"routing": None, "short": "live"}, "'short' without 'routing'"),
    "a routing in an unknown form": ({"routing_format": "magic"}, "kind is 'magic'"),
    "a format alone": ({"routing": None, "routing_format": "vllm"}, "'routing_format' without 'routing'"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_a_bad_rollout_is_named_by_file_and_line(first_step, change, message):
    with pytest.raises(UserError, match=r"train\.jsonl:2: ") as raised:
        first_step([rollout(), rollout(**change)])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_non_finite_reward_is_refused(write_jsonl, run_config, processor):
    line = json.dumps(rollout()).replace('"reward": 1.0', '"reward": NaN')
    with pytest.raises(UserError, match="'reward' is nan"):
        TrainStream(run_config(write_jsonl([line])), processor, rank=0, world_size=1, record_kind=Rollouts(SHAPE))
