"""Micro-batches: padding, masks, images; over-long samples; the fillers that stand for missing ones."""

from pathlib import Path

import pytest
import torch

from ds_moe.data.chat import parse_record
from ds_moe.data.encode import NO_LOSS, Encoded, collate, collate_prompts, encode, filler
from ds_moe.data.images import RecordError
from ds_moe.models.presets import build_preset
from tests.records import chat


@pytest.fixture
def mixed(processor, folder):
    """Two images, no image, one image."""
    records = [
        {**chat("<image> or <image>?", "four"), "images": ["a.png", "b.png"]},
        chat("Hi", "yes and no and yes"),
        {**chat("<image>Which digit is this?", "7"), "images": ["b.png"]},
    ]
    return [encode(parse_record(record, "test:1", folder), processor, 512, 10**6) for record in records]


def test_mixed_batch_right_padded(mixed, processor):
    batch = collate(mixed, processor)
    given = batch.with_labels
    assert sorted(given) == [
        "attention_mask", "image_grid_thw", "input_ids", "labels", "mm_token_type_ids", "pixel_values",
        "position_ids"]  # fmt: skip
    made_by_a_model, _ = build_preset("tiny-vl-moe").model.get_rope_index(
        **{name: value for name, value in batch.inputs.items() if name not in ("pixel_values", "position_ids")}
    )
    assert torch.equal(batch.inputs["position_ids"], made_by_a_model)
    assert {"position_ids", "image_position_ids"}.isdisjoint(collate_prompts(mixed, processor).inputs)
    longest = max(len(one.input_ids) for one in mixed)
    for row, one in enumerate(mixed):
        size = len(one.input_ids)
        assert batch.inputs["input_ids"][row, :size].equal(one.input_ids) and batch.labels[row, :size].equal(one.labels)
        assert batch.inputs["attention_mask"][row].tolist() == [1] * size + [0] * (longest - size)
        assert (batch.labels[row, size:] == NO_LOSS).all()
        assert (batch.inputs["input_ids"][row, size:] == processor.tokenizer.pad_token_id).all()
    assert all(given[key].dtype == torch.int64 for key in given if key != "pixel_values")
    assert batch.inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 8], [1, 4, 8]]
    assert batch.inputs["pixel_values"].shape == (16 + 32 + 32, 3 * 2 * 4 * 4)
    assert batch.inputs["pixel_values"][:48].equal(mixed[0].pixel_values)
    for row, one in enumerate(mixed):
        size = len(one.input_ids)
        assert batch.sequence_of_token[row].tolist() == [row] * size + [-1] * (longest - size)
    assert batch.real_B.tolist() == [True] * 3 and batch.tokens == batch.inputs["attention_mask"].sum()
    # One image token for each 2x2 patches, where the processor itself says image.
    assert batch.inputs["mm_token_type_ids"].sum(1).tolist() == [12, 0, 8]
    own = processor.create_mm_token_type_ids(batch.inputs["input_ids"].tolist())
    assert batch.inputs["mm_token_type_ids"].tolist() == own


def test_a_packed_row_is_the_samples_behind_one_another(mixed, processor):
    encoded = [*mixed, filler(processor)]
    packed, rows = collate(encoded, processor, packed=True), collate(encoded, processor)
    assert packed.packed and not rows.packed and packed.samples == rows.samples == 4
    assert "attention_mask" not in packed.inputs
    sizes = [len(one.input_ids) for one in encoded]
    ends = [sum(sizes[:place]) for place in range(5)]
    assert packed.lengths.tolist() == rows.lengths.tolist() == sizes
    assert packed.inputs["input_ids"].tolist() == [torch.cat([one.input_ids for one in encoded]).tolist()]
    assert packed.sequence_of_token.tolist() == [sum(([place] * size for place, size in enumerate(sizes)), [])]
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert packed.inputs[name].dtype == torch.int32 and packed.inputs[name].tolist() == ends
    assert packed.inputs["max_length_q"] == packed.inputs["max_length_k"] == max(sizes)
    assert packed.inputs["sample_lengths"] == tuple(sizes)
    assert packed.inputs["position_ids"].shape == (4, 1, sum(sizes))
    assert packed.inputs["position_ids"][:, 0, ends[:-1]].tolist() == [[0] * 4] * 4
    real = rows.inputs["attention_mask"].bool()
    for name in ("input_ids", "mm_token_type_ids"):
        assert packed.inputs[name][0].equal(rows.inputs[name][real])
    for name in ("pixel_values", "image_grid_thw"):
        assert packed.inputs[name].equal(rows.inputs[name])
    assert packed.label_tokens == rows.label_tokens and packed.tokens == rows.tokens == sum(sizes) - 1
    assert packed.real_B.tolist() == [True, True, True, False]
    assert not packed.whole and not rows.whole and not collate(mixed, processor).whole
    assert collate(mixed, processor, packed=True).whole and collate(mixed[:1], processor).whole


def test_no_label_of_a_packed_row_is_predicted_by_another_sample(processor):
    learned = torch.tensor([5, 6, 7])  # a sample whose very first token has a label, which nothing predicts
    one = Encoded(learned, learned.clone(), prompt=0)
    packed, rows = collate([one, one], processor, packed=True), collate([one, one], processor)
    assert packed.labels.tolist() == [[NO_LOSS, 6, 7, NO_LOSS, 6, 7]]
    assert packed.label_tokens == rows.label_tokens == 4
    assert one.labels.tolist() == [5, 6, 7]


def test_a_packed_batch_moves_with_its_numbers(mixed, processor):
    batch = collate(mixed, processor, packed=True)
    batch.kind_B = torch.tensor([0, -1, 1])
    moved = batch.to(torch.device("meta"))
    assert moved.inputs["sample_lengths"] == batch.inputs["sample_lengths"] and moved.inputs["max_length_q"] > 0
    assert moved.inputs["cu_seq_lens_q"].device.type == moved.labels.device.type == "meta"
    kinds = batch.kind_of_token[0]
    assert [kinds[batch.sequence_of_token[0] == place].unique().tolist() for place in range(3)] == [[0], [-1], [1]]


def test_text_models_have_one_row_of_positions(text_processor):
    batch = collate([filler(text_processor), filler(text_processor)], text_processor, packed=True)
    assert batch.inputs["position_ids"].tolist() == [[0, 0]] and "mm_token_type_ids" not in batch.inputs


def test_prompts_left_padded_without_labels(mixed, processor):
    batch = collate_prompts(mixed, processor)
    assert "labels" not in batch.inputs and batch.inputs["image_grid_thw"].shape == (3, 3)
    for row, one in enumerate(mixed):
        missing = batch.inputs["input_ids"].shape[1] - one.prompt
        assert batch.inputs["input_ids"][row, missing:].equal(one.input_ids[: one.prompt])
        assert batch.inputs["attention_mask"][row].tolist() == [0] * missing + [1] * one.prompt
    ends = processor.tokenizer.batch_decode(batch.inputs["input_ids"])
    assert all(end.endswith("<|im_start|>assistant\n") for end in ends)


def test_without_images_there_are_none_but_token_types_for_a_vl_model(processor, text_processor):
    samples = {model: [encode(parse_record(chat("Hi"), "test:1", Path("/")), model, 99, 1)]
               for model in (processor, text_processor)}  # fmt: skip
    assert sorted(collate(samples[processor], processor).with_labels) == [
        "attention_mask", "input_ids", "labels", "mm_token_type_ids"]  # fmt: skip
    assert sorted(collate(samples[text_processor], text_processor).with_labels) == [
        "attention_mask",
        "input_ids",
        "labels",
    ]


def test_over_long_is_refused_at_exactly_one_token_too_many(processor, folder):
    sample = parse_record({**chat("<image>Which digit is this?", "7"), "images": ["a.png"]}, "test:1", folder)
    length = len(encode(sample, processor, 512, 10**6).input_ids)
    assert len(encode(sample, processor, length, 10**6).input_ids) == length
    with pytest.raises(RecordError, match=rf"over-long: {length} tokens, 4 of them of images.* {length - 1} \("):
        encode(sample, processor, length - 1, 10**6)


def test_filler_has_no_label_and_no_image(processor):
    batch = collate([filler(processor)], processor)
    assert batch.labels.tolist() == [[NO_LOSS]] and batch.inputs["attention_mask"].tolist() == [[1]]
    assert not filler(processor).real
    assert "pixel_values" not in batch.inputs and batch.inputs["mm_token_type_ids"].tolist() == [[0]]
