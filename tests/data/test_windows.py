"""The order of streamed records: each once an epoch, well mixed, and the same from any place on."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from ds_moe.data import blocks as blocks_module
from ds_moe.data.blocks import Blocks, Source
from ds_moe.data.sources.files import data_file
from ds_moe.data.windows import Interleaving, Pool, PoolPlace, draws, whole_numbers
from ds_moe.errors import UserError

ROWS, ROW = 400, 16  # records of ROW bytes each


def write(file, rows=ROWS, first=0):
    file.write_text("".join(f'{{"n":{first + row:09}}}\n' for row in range(rows)))
    return file


@pytest.fixture
def blocks(tmp_path, monkeypatch):
    """40 blocks of 10 records each."""
    monkeypatch.setattr(blocks_module, "BLOCK", 10 * ROW)
    return Blocks.of([source(write(tmp_path / "a.jsonl"))])


def source(file, name=None, weight=None):
    return Source((data_file(file, str(file)),), name, weight)


def pool(blocks, window=80 * ROW, seed=0, shuffle=True):
    return Pool(blocks, np.arange(len(blocks)), window, (seed, 0), shuffle)


def taken(mixture, count):
    return [int(row.where.partition("@")[2]) // ROW for row in mixture.take(count)]


def from_start(*pools, weights=(1,)):
    return Interleaving(pools, weights, [PoolPlace()] * len(pools))


def test_every_record_once_an_epoch_each_in_another_order(blocks):
    mixture = from_start(pool(blocks))
    epochs = [taken(mixture, ROWS) for _ in range(3)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert mixture.places == [PoolPlace(2, 4, 80, 3 * ROWS)]
    assert taken(from_start(pool(blocks)), ROWS) == epochs[0] != taken(from_start(pool(blocks, seed=1)), ROWS)
    assert taken(from_start(pool(blocks, shuffle=False)), ROWS) == list(range(ROWS))


def test_a_window_holds_whole_blocks_from_all_over_the_file(blocks):
    order = taken(from_start(pool(blocks)), ROWS)
    for start in range(0, ROWS, 80):
        of_blocks = Counter(row // 10 for row in order[start : start + 80])
        assert len(of_blocks) == 8 and set(of_blocks.values()) == {10}
    assert taken(from_start(pool(blocks, window=1)), 10) != list(range(10))  # a block is the least


def test_any_place_goes_on_with_the_same_records_however_it_was_reached(blocks):
    chance = random.Random(0)
    whole = taken(from_start(pool(blocks)), 3 * ROWS)
    for _ in range(20):
        place = chance.randrange(2 * ROWS)
        mixture = from_start(pool(blocks))
        while sum(one.samples for one in mixture.places) < place:
            left = place - mixture.places[0].samples
            step = chance.randint(1, left)
            mixture.skip(step) if chance.random() < 0.5 else mixture.take(step)
        resumed = Interleaving([pool(blocks)], [1], mixture.places)
        assert taken(resumed, ROWS) == whole[place : place + ROWS]


def test_windows_without_a_record_are_passed_over_and_nothing_but_blanks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks_module, "BLOCK", 16)
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "x" * 500}) + "\n" + "\n" * 100 + '{"n": 1}\n')
    mixture = from_start(pool(Blocks.of([source(file)]), window=16))
    assert Counter(row.length for row in mixture.take(6)) == {513: 3, 9: 3}
    file.write_text("\n" * 100)
    with pytest.raises(UserError, match=r"no file has a record, from .*\.jsonl on"):
        from_start(pool(Blocks.of([source(file)]), window=16)).take(1)


def test_a_place_beyond_what_its_window_has_is_refused(blocks):
    for place in (PoolPlace(0, 0, 81, 81), PoolPlace(0, 5, 0, 400)):
        with pytest.raises(UserError, match=f"at row {place.row} of window {place.window}.*: a file has changed"):
            Interleaving([pool(blocks)], [1], [place]).take(1)


# --- several sources


def test_weights_are_exact_and_no_pool_is_ahead_by_a_whole_sample():
    assert whole_numbers([0.1, 0.2, 0.7]) == [1, 2, 7] and whole_numbers([3, 1.5]) == [2, 1]
    assert whole_numbers([1e-9, 1]) == [1, 10**9]
    for weights in ([1], [1, 2, 7], [5, 5], [1, 1, 1, 97], [3, 4, 5, 6, 7, 8]):
        total = sum(weights)
        drawn = draws(weights, [0] * len(weights), 3 * total)
        for end in range(1, len(drawn) + 1):
            for one, weight in enumerate(weights):
                assert drawn[:end].count(one) - end * weight / total < 1
        for end in (total, 2 * total, 3 * total):
            assert [drawn[:end].count(one) for one in range(len(weights))] == [end // total * w for w in weights]
        for cut in (1, total // 2, total + 1):
            sofar = [drawn[:cut].count(one) for one in range(len(weights))]
            assert draws(weights, sofar, len(drawn) - cut) == drawn[cut:]


def test_a_source_that_ends_begins_anew_in_another_order(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks_module, "BLOCK", 10 * ROW)
    files = [write(tmp_path / "a.jsonl", 40), write(tmp_path / "b.jsonl", 400)]
    blocks = Blocks.of([source(file, file.stem, 1.0) for file in files])
    of_source = [np.array([number for number in range(len(blocks)) if blocks.source(number) == one]) for one in (0, 1)]
    pools = [Pool(blocks, own, 20 * ROW, (0, number), True) for number, own in enumerate(of_source)]
    mixture = from_start(*pools, weights=[1, 3])
    rows = mixture.take(320)
    small = [int(row.where.partition("@")[2]) // ROW for row in rows if row.source == 0]
    assert len(small) == 80 and sorted(small[:40]) == sorted(small[40:]) == list(range(40))
    assert small[:40] != small[40:] and [place.epoch for place in mixture.places] == [1, 0]
    skipped = from_start(*pools, weights=[1, 3])
    skipped.skip(117)
    assert [row.where for row in skipped.take(203)] == [row.where for row in rows[117:]]


# --- how well it is mixed


def mixing(order, per_block, batch):
    """(mean distance between a record's places in file and order, neighbours out of one block, variance of the mean
    over a batch of what is constant in a block), the first two as shares, the last in that of a full permutation."""
    order = np.asarray(order)
    block = order // per_block
    blocks = int(block.max()) + 1
    away = np.abs(np.argsort(order) - np.arange(len(order))).mean() / len(order)
    whole = order[: len(order) // batch * batch]
    values = np.random.default_rng(0).standard_normal((200, blocks))
    values -= values.mean(1, keepdims=True)
    found = values[:, whole // per_block].reshape(200, -1, batch).mean(-1).var()
    full = (values**2).mean() / batch * (len(order) - batch) / (len(order) - 1)
    return away, (block[1:] == block[:-1]).mean(), found / full


def test_the_figures_of_the_documentation(tmp_path, monkeypatch):
    """Blocks come from anywhere, as in a full permutation; of w blocks in a window a neighbour shares one in w times,
    and data that are sorted make the mean of a batch of G vary by 1 + (G - 1) / w."""
    per_block, count, batch = 20, 512, 64
    monkeypatch.setattr(blocks_module, "BLOCK", per_block * ROW)
    blocks = Blocks.of([source(write(tmp_path / "a.jsonl", per_block * count))])
    full = np.random.default_rng(0).permutation(per_block * count)
    away, neighbours, varies = mixing(full, per_block, batch)
    assert abs(away - 1 / 3) < 0.02 and neighbours < 0.005 and abs(varies - 1) < 0.1
    found = {}
    for in_window in (8, 32, 128):
        order = taken(from_start(pool(blocks, window=in_window * per_block * ROW)), per_block * count)
        away, neighbours, found[in_window] = mixing(order, per_block, batch)
        assert abs(away - 1 / 3) < 0.02
        assert neighbours == pytest.approx(1 / in_window, rel=0.3)
        assert found[in_window] == pytest.approx(1 + (batch - 1) / in_window, rel=0.25)
    assert found[8] > found[32] > found[128] > 1
