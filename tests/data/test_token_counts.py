"""Exact tokens and patches of records without a decoded pixel, kept for the next start and the other ranks."""

import json
import multiprocessing
import time

import numpy as np
import pytest
from PIL import Image

import ds_moe.data.token_counts
from ds_moe.data import images
from ds_moe.data.chat import BadRecord
from ds_moe.data.encoder import Encoder
from ds_moe.data.records import open_records
from ds_moe.data.token_counts import token_counts
from ds_moe.errors import UserError
from ds_moe.replay.align import RoutingShape
from ds_moe.tasks.gate.records import Routed
from ds_moe.tasks.rl.rollouts import Rollouts
from tests.launcher import HANGS_S
from tests.records import chat

SIZES = [(16, 16), (32, 16), (5, 70), (200, 30), (64, 64), (91, 37), (1, 1), (300, 300)]


@pytest.fixture
def path(folder, write_jsonl):
    """Images of every shape and orientation, alone and several in a record, and text alone."""
    draw = np.random.default_rng(0)
    names = []
    for number, size in enumerate(SIZES):
        for orientation in (1, 6):
            exif = Image.Exif()
            exif[0x0112] = orientation
            names.append(f"{number}_{orientation}.jpg")
            pixels = draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / names[-1], exif=exif)
    records = [{**chat("<image> What is this?"), "images": [name]} for name in names]
    records.append({**chat("<image> and <image> and <image>?"), "images": names[:3]})
    records += [chat("no image " * count) for count in range(1, 5)]
    return write_jsonl(records)


def counted(config, processor, record_kind=None, path=None):
    options = {} if record_kind is None else {"record_kind": record_kind}
    records = open_records(path or config.data.train, "train", config.data, **options)
    return token_counts(config, "train", records, Encoder(config, records, processor), processor), records


def as_encoded(config, processor, records):
    encoded, _, bad = Encoder(config, records, processor).encode(list(range(len(records))))
    tokens = [len(one.input_ids) for one in encoded]
    return tokens, [0 if one.pixel_values is None else len(one.pixel_values) for one in encoded], bad


def test_counts_are_those_of_encoded_records_but_no_pixel_is_decoded(path, run_config, processor, monkeypatch):
    config = run_config(path)

    def decode(*args):
        raise AssertionError("a pixel was decoded")

    with monkeypatch.context() as patched:
        patched.setattr(images.ImageOps, "exif_transpose", decode)
        patched.setattr("ds_moe.data.encode.load_image", decode)
        counts, records = counted(config, processor)
    tokens, patches, bad = as_encoded(config, processor, records)
    assert (counts.tokens.tolist(), counts.patches.tolist(), bad) == (tokens, patches, [])
    assert len(set(patches)) > 5 and counts.bad == {}


def test_an_image_processor_that_does_not_resize_is_asked_itself(path, run_config, processor, monkeypatch, write_jsonl):
    monkeypatch.setattr(processor.image_processor, "do_resize", False)
    config = run_config(
        write_jsonl([{**chat("<image>?"), "images": ["b.png"]}, {**chat("<image>?"), "images": ["0_1.jpg"]}])
    )
    counts, records = counted(config, processor)
    assert counts.patches.tolist() == as_encoded(config, processor, records)[1] == [32, 16]


def test_every_kind_of_record_is_measured(write_jsonl, run_config, processor):
    ids = processor.tokenizer("What is this?").input_ids
    rollout = {
        "tokens": ids,
        "completion_mask": [0] * (len(ids) - 2) + [1, 1],
        "logprobs": [-1.0, -0.5],
        "advantage": 1.0,
    }
    routing = np.broadcast_to(np.array([1, 2], dtype=np.uint8), (len(ids) - 1, 2, 2)).tolist()
    shape = RoutingShape(layers=2, moe_layers=(0, 1), experts=8, top_k=2)
    for kind, record in [
        (Rollouts(shape), {**rollout, "routing": routing}),
        (Routed(["a", "b"], labelled=True), {**chat("hello " * 3), "adapter": "b"}),
    ]:
        config = run_config(write_jsonl([record] * 3, f"{type(kind).__name__}.jsonl"))
        counts, records = counted(config, processor, kind)
        assert counts.tokens.tolist() == as_encoded(config, processor, records)[0] and len(counts.tokens) == 3
    config = run_config("digits")
    counts, records = counted(config, processor)
    sample = [0, 1, 2, 3000]
    encoded = Encoder(config, records, processor).encode(sample)[0]
    assert counts.tokens[sample].tolist() == [len(one.input_ids) for one in encoded]


def test_counts_are_measured_once_and_again_where_they_are_stale_or_damaged(
    path, folder, run_config, processor, monkeypatch
):
    measured = []
    real = ds_moe.data.token_counts._measured
    monkeypatch.setattr(ds_moe.data.token_counts, "_measured", lambda *args: measured.append(1) or real(*args))

    def times(action):
        measured.clear()
        return action(), len(measured)

    def same(**options):
        return counted(run_config(path, options), processor)[0]

    first, count = times(same)
    assert count == 1
    again, count = times(same)
    assert (
        count == 0
        and again.tokens.tolist() == first.tokens.tolist()
        and again.patches.tolist() == first.patches.tolist()
    )
    for stale in (
        {"max_length": 300},
        {"train_on": "last"},
        {"max_pixels": 10**6},
        {"root": str(folder.parent / "data")},
    ):
        assert times(lambda stale=stale: same(**stale))[1] == 1
        assert times(lambda stale=stale: same(**stale))[1] == 0
    same()
    whole = first.file.read_bytes()
    for place in (len(whole) // 3, len(whole) // 2, -30):  # bits of the arrays and of the archive's directory
        damaged = bytearray(whole)
        damaged[place] ^= 64
        first.file.write_bytes(damaged)
        again, count = times(same)
        assert count == 1 and again.tokens.tolist() == first.tokens.tolist()
    first.file.write_bytes(whole[: len(whole) // 2])
    assert times(same)[1] == 1
    Image.new("RGB", (640, 640)).save(folder / "0_1.jpg")  # another size behind the same name
    again, count = times(same)
    assert count == 1 and again.tokens.tolist() != first.tokens.tolist()
    path.write_text(path.read_text() + json.dumps(chat("one more")) + "\n")
    assert times(same)[1] == 1
    monkeypatch.setattr(processor.tokenizer, "chat_template", processor.chat_template + " ")
    assert times(same)[1] == 1


def test_bad_records_stop_or_are_listed_and_are_looked_at_again(path, folder, write_jsonl, run_config, processor):
    Image.new("RGB", (500, 2)).save(folder / "wide.png")
    long = chat("far too long " * 100)
    path = write_jsonl([chat("hi"), {**chat("<image>?"), "images": ["wide.png"]}, long, chat("ho")])
    limits = {"max_length": 128}
    with pytest.raises(UserError, match=r"train.jsonl:2: an image is refused.*\[and 1 more bad records\]"):
        counted(run_config(path, limits), processor)
    config = run_config(path, {**limits, "on_bad_record": "skip"})
    counts, _ = counted(config, processor)
    assert counts.tokens[[1, 2]].tolist() == [0, 0] and counts.tokens[[0, 3]].min() > 0
    assert {index: one.where[-2:] for index, one in counts.bad.items()} == {1: ":2", 2: ":3"}
    assert all(isinstance(one, BadRecord) for one in counts.bad.values())
    Image.new("RGB", (50, 20)).save(folder / "wide.png")  # as many thousands of pixels, so only a look tells
    assert sorted(counted(config, processor)[0].bad) == [2]


def _measure(config, processor, delay_s, results):
    real = ds_moe.data.token_counts._measured

    def slow(*args):
        time.sleep(delay_s)
        results.put("measured")
        return real(*args)

    ds_moe.data.token_counts._measured = slow
    results.put(int(counted(config, processor)[0].tokens.sum()))


def test_ranks_of_a_host_measure_once_and_do_not_race(path, run_config, processor):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_measure, args=(run_config(path), processor, 0.5, results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=HANGS_S) for _ in range(5)]
    for rank in ranks:
        rank.join()
    assert found.count("measured") == 1 and len(set(found)) == 2 and results.empty()


@pytest.mark.parametrize("workers", [0, 1])
def test_many_records_are_measured_by_loading_processes_in_their_order(
    write_jsonl, run_config, processor, workers, monkeypatch, capsys
):
    monkeypatch.setattr(ds_moe.data.token_counts, "CHUNK", 3)
    monkeypatch.setattr(ds_moe.data.token_counts, "SHOWN_EVERY_S", 0.0)
    path = write_jsonl([chat("word " * count) for count in range(1, 12)])
    config = run_config(path, {"num_workers": workers})
    counts, records = counted(config, processor)
    assert counts.tokens.tolist() == as_encoded(config, processor, records)[0]
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "data.train: tokens of 3 of 11 records counted" and " and kept in " in shown[-1]
