"""tools/bench/streaming/bench.py: its data are as many as it says, and its figures tell a shuffle from none."""

import json

import numpy as np

from tools.bench.streaming.bench import buffered, mixing, quality_tables, shuffle_quality, write_data


def test_shards_are_links_to_the_first(tmp_path):
    data = write_data(tmp_path / "data", records=250, shard=100)
    files = sorted((tmp_path / "data").iterdir())
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert len(files) == data["files"] == 3 and len(lines) == 300 and data["bytes"] == sum(map(len, lines)) + 300
    text = [turn["content"] for turn in json.loads(lines[0])["messages"]]
    assert 80 < len("".join(text)) < 120 and len({file.stat().st_ino for file in files}) == 1


def test_a_buffer_gives_each_record_once_and_near_its_place():
    chance = np.random.default_rng(0)
    order = np.fromiter(buffered(5000, 50, chance), dtype=np.int64)
    assert sorted(order) == list(range(5000))
    near, full, none = (mixing(one, 10) for one in (order, chance.permutation(5000), np.arange(5000)))
    assert none["displacement"] == 0 < near["displacement"] < 0.02 < 0.3 < full["displacement"]
    assert none["variance"] > near["variance"] > 2 > full["variance"]
    assert none["neighbours_of_a_block"] > near["neighbours_of_a_block"] > full["neighbours_of_a_block"]


def test_windows_lie_between_a_buffer_and_a_full_permutation():
    quality = {one["order"]: one for one in shuffle_quality(10**9, 10**6)}
    assert quality["window of 8 MiB"]["displacement"] > 0.3 > quality["datasets' buffer of 1,000"]["displacement"]
    assert len(quality_tables(list(quality.values()))[0].rows) == 7
