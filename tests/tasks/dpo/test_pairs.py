"""Pairs as tensors: rows, lengths, kinds, and the plan in which a pair is one sample."""

import json

import numpy as np
import pytest
import torch

from ds_moe.data.batch import NO_LOSS
from ds_moe.data.encode import filler
from ds_moe.data.images import RecordError
from ds_moe.data.stream import TrainStream
from ds_moe.tasks.dpo.pair_record import parse_pair
from ds_moe.tasks.dpo.pairs import PAIRS
from tests.records import labelled

LIMITS = (128, 2**20)


def record(question="<image>Even?", chosen="yes", rejected="no no", image="a.png", **more):
    images = {"images": [image]} if image else {}
    return {
        "messages": [{"role": "user", "content": question}],
        "chosen": chosen,
        "rejected": rejected,
        **images,
        **more,
    }


@pytest.fixture
def encoded(folder, processor):
    """encoded(record) -> its tensors."""

    def encode(one, limit=128, pixels=True):
        pair = parse_pair(one, "file:1", folder.resolve())
        return PAIRS.encode(pair, processor, limit, 2**20, pixels=pixels)

    return encode


def test_a_pair_is_two_sequences_with_the_same_images(encoded, processor):
    chosen, rejected = encoded(record()).sequences()
    assert labelled(chosen, processor).startswith("yes") and labelled(rejected, processor).startswith("no no")
    assert chosen.pixel_values is rejected.pixel_values and chosen.pixel_values is not None
    for packed in (False, True):
        batch = PAIRS.collate([encoded(record()), encoded(record("Odd?", image=None))], processor, packed=packed)
        assert batch.samples == 4 and len(batch.number_P) == 2 and batch.packed == packed
        image_tokens = int((batch.inputs["input_ids"] == processor.image_token_id).sum())
        assert len(batch.inputs["image_grid_thw"]) == 2
        assert (
            image_tokens
            == int(batch.inputs["image_grid_thw"].prod(-1).sum()) // processor.image_processor.merge_size**2
        )


def test_packed_and_padded_rows_hold_the_same(encoded, processor):
    pairs = [encoded(record(rejected=text)) for text in ("no", "no no no")] + [filler(processor)]
    padded, packed = (PAIRS.collate(pairs, processor, packed=packed) for packed in (False, True))
    assert (
        padded.lengths.tolist()
        == packed.lengths.tolist()
        == [*(len(s.labels) for p in pairs[:2] for s in p.sequences()), 1, 1]
    )
    assert padded.real_P.tolist() == packed.real_P.tolist() == [True, True, False]
    padded.kind_B = packed.kind_B = torch.tensor([3, 5, -1])
    for batch in (padded, packed):
        of_tokens = torch.bincount(batch.kind_of_token.flatten() + 1, minlength=7)
        assert of_tokens[4] == len(pairs[0].input_ids) and of_tokens[6] == len(pairs[1].input_ids)
    assert packed.label_tokens == padded.label_tokens == sum(int((p.labels != NO_LOSS).sum()) for p in pairs)


def test_max_length_bounds_twice_the_longer_sequence(encoded):
    one = encoded(record())
    longer = max(one.chosen, len(one.input_ids) - one.chosen)
    assert len(encoded(record(), limit=2 * longer).input_ids) < 2 * longer
    with pytest.raises(RecordError, match=f"2 x {longer} tokens, beyond data.max_length {2 * longer - 1}"):
        encoded(record(), limit=2 * longer - 1)


def test_measured_without_pixels_as_with_them(encoded):
    with_pixels, without = encoded(record()), encoded(record(), pixels=False)
    assert torch.equal(with_pixels.input_ids, without.input_ids) and without.pixel_values is None


def test_answers_of_the_same_tokens_are_refused(encoded):
    with pytest.raises(RecordError, match="the same tokens"):
        encoded(record(rejected={"role": "assistant", "content": "yes", "reasoning_content": ""}))


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_holds_every_pair_once_on_any_number_of_ranks(packing, write_jsonl, run_config, processor):
    records = [record(rejected="no " * (1 + n % 4), kind=f"k{n % 2}") for n in range(7)]
    file = write_jsonl(records)
    rows = {"packing": True, "max_length": 128} if packing else {}
    for world_size in (1, 2, 3):
        size = {"micro_batch_size": 1, "global_batch_size": 6, "steps": 1}
        found = []
        for rank in range(world_size):
            config = run_config(file, data=rows, **size)
            stream = TrainStream(config, processor, rank=rank, world_size=world_size, record_kind=PAIRS)
            assert stream.steps_per_epoch == 2
            for _, step in zip(range(2), stream, strict=False):
                for batch in step:
                    assert batch.samples == 2 * len(batch.number_P) and batch.kind_of_token.shape == batch.labels.shape
                    found += batch.number_P[batch.real_P].tolist()
        assert sorted(found) == list(range(7))
    assert (
        json.loads(file.read_text().splitlines()[0])["rejected"] == "no "
        and np.array(stream.rows.order.lengths).min() > 0
    )
