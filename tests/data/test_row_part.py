"""Parts of a packed row: together they are the row, and images' features arrive where their tokens lie."""

import itertools

import pytest
import torch

from ds_moe.data.batch import NO_LOSS
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import collate, encode, filler
from ds_moe.data.row_part import dealt, part_of_row
from ds_moe.models.processor import tiny_processor
from tests.samples import filmed, joined, without_image


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def row(processor):
    one, two, three, four = (encode(sample, processor, 256, 2**20) for sample in digits_samples("train")[:4])
    text = without_image(four, processor.image_token_id)
    return collate([text, joined(one, two), filler(processor), filmed(processor), three], processor, packed=True)


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_parts_are_the_row(row, ranks, processor):
    parts = [part_of_row(row, rank, ranks, processor) for rank in range(ranks)]
    tokens, size = row.labels.shape[1], -(-row.labels.shape[1] // ranks)
    for values in ("labels", "sequence_of_token", "real_of_token"):
        together = torch.cat([getattr(part, values) for part in parts], dim=1)
        assert torch.equal(together[:, :tokens], getattr(row, values))
    for name in ("input_ids", "position_ids", "mm_token_type_ids"):
        together = torch.cat([part.inputs[name] for part in parts], dim=-1)
        assert torch.equal(together[..., :tokens], row.inputs[name])
    assert not torch.cat([part.real_of_token for part in parts], dim=1)[:, tokens:].any()
    for part in parts:
        assert part.inputs["input_ids"].shape == (1, size)
        assert sum(part.inputs["sample_lengths"]) == size * ranks
        assert torch.equal(part.real_B, row.real_B)
    assert sum(part.label_tokens for part in parts) == row.label_tokens
    assert sum(part.tokens for part in parts) == row.tokens


def test_the_next_part_s_first_label_is_known(row, processor):
    ranks = row.labels.shape[1]  # a token each
    parts = [part_of_row(row, rank, ranks, processor) for rank in range(ranks)]
    behind = [int(part.next_label) for part in parts]
    assert behind == [*row.labels[0, 1:].tolist(), NO_LOSS]


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_features_arrive_in_order(row, ranks, processor):
    """Features are numbered as their tokens follow in the row; the all-to-all is played here."""
    parts = [part_of_row(row, rank, ranks, processor) for rank in range(ranks)]
    routes = [part.inputs["row_part"].features for part in parts]
    counts = (row.inputs["image_grid_thw"].prod(-1) // processor.image_processor.merge_size**2).tolist()
    numbers = torch.arange(sum(counts)).split(counts)
    owners = dealt(row.inputs["image_grid_thw"].prod(-1).tolist(), ranks).tolist()
    outboxes = []
    for rank, route in enumerate(routes):
        own = [numbers[image] for image, owner in enumerate(owners) if owner == rank]
        own = torch.cat(own) if own else torch.arange(0)
        outboxes.append(own[route.rows_S].split(route.send))
        given = parts[rank].inputs
        assert ("pixel_values" in given) == (rank in owners)
        if rank in owners:
            assert len(given["pixel_values"]) == given["image_grid_thw"].prod(-1).sum()
    expected = 0
    for rank, route in enumerate(routes):
        inbox = [outboxes[other][rank] for other in range(ranks)]
        assert [len(one) for one in inbox] == route.receive
        arrived = torch.cat(inbox)[route.order_M]
        tokens = int((parts[rank].inputs["input_ids"] == processor.image_token_id).sum())
        assert arrived.tolist() == list(range(expected, expected + tokens))
        expected += tokens
    assert expected == sum(counts)


def test_images_are_dealt_by_their_size():
    owners = dealt([9, 1, 5, 5, 1], 2)
    loads = [sum(cost for cost, owner in zip([9, 1, 5, 5, 1], owners, strict=True) if owner == rank) for rank in (0, 1)]
    assert sorted(loads) == [10, 11]
    assert dealt([4], 3).tolist() == [0]


def test_a_row_without_images_has_no_routes(processor):
    text = without_image(encode(digits_samples("train")[0], processor, 256, 2**20), processor.image_token_id)
    part = part_of_row(collate([text], processor, packed=True), 1, 2, processor)
    assert part.inputs["row_part"].features is None and "pixel_values" not in part.inputs


def test_what_cannot_be_cut_is_an_error(row, processor):
    padded = collate([filler(processor)], processor)
    with pytest.raises(ValueError, match="only packed rows"):
        part_of_row(padded, 0, 2, processor)
    row.inputs["routing"] = torch.zeros(1)
    with pytest.raises(ValueError, match="'routing'"):
        part_of_row(row, 0, 2, processor)
    del row.inputs["routing"]


def test_padding_is_a_sample_of_its_own(row, processor):
    for ranks in (2, 3, 4):
        padding = -row.labels.shape[1] % ranks
        last = part_of_row(row, ranks - 1, ranks, processor)
        lengths = list(row.inputs["sample_lengths"]) + ([padding] if padding else [])
        assert list(last.inputs["sample_lengths"]) == lengths
        assert last.whole == (row.whole and not padding)
    assert list(itertools.accumulate(lengths))[-1] % 4 == 0
