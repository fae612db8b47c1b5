"""Images that threads decode ahead: what a run gets, and what it says, is what it would be without them."""

import io
import json
import random
import threading
import time
import warnings
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from ds_moe.data import encoder as encoder_module
from ds_moe.data import images as images_module
from ds_moe.data import step_dataset as steps_module
from ds_moe.data.ahead import Ahead, one_ahead
from ds_moe.data.encode import patches_of
from ds_moe.data.eval_set import EvalSet
from ds_moe.data.images import ImageSource, RecordError, image_size, load_image
from ds_moe.data.prepared.make import prepare
from ds_moe.data.records import records_of
from ds_moe.data.streaming import train_stream
from ds_moe.data.workers import MOST_THREADS, image_threads
from ds_moe.errors import UserError
from tests.records import chat

RECORDS, STEPS = 26, 6  # with a global batch of 8: three steps an epoch and more
WAIT_S = 20


BYTES = 32


def patches(value: int):
    return torch.full((8,), value, dtype=torch.uint8), torch.tensor([[1, 1, 1]])


# --- threads


@pytest.mark.parametrize("threads", [1, 3])
def test_each_gets_its_own_in_any_order(threads):
    ahead = Ahead(threads, limit=5 * BYTES)

    def make(number: int):
        time.sleep(random.Random(number).random() / 500)
        if number % 5 == 0:
            raise RecordError(f"broken {number}")
        return patches(number)

    begun = [ahead.begin(lambda number=number: make(number)) for number in range(40)]
    for number in random.Random(0).sample(range(40), 40):
        if number % 7 == 1:
            begun[number].drop()
        elif number % 5 == 0:
            with pytest.raises(RecordError, match=f"broken {number}$"):
                begun[number].take()
        else:
            assert begun[number].take()[0].tolist() == [number] * 8
            begun[number].drop()  # does nothing
    assert ahead._ready == 0 and not ahead._waiting
    ahead.close()


def test_threads_stop_at_the_limit_and_go_on_once_patches_are_taken():
    ahead, made = Ahead(1, limit=2 * BYTES), []

    def make(number: int):
        made.append(number)
        return patches(number)

    begun = [ahead.begin(lambda number=number: make(number)) for number in range(5)]
    until(lambda: ahead._idle == 1 and len(made) > 1)
    assert made == [0, 1] and ahead._ready == 2 * BYTES
    assert begun[4].take()[0].tolist() == [4] * 8  # made by who asks
    assert made == [0, 1, 4]
    begun[0].take()
    until(lambda: ahead._idle == 1 and len(made) > 3)
    assert made == [0, 1, 4, 2]
    ahead.close()


def test_who_waits_for_a_thread_makes_what_comes_next():
    ahead, go, makers = Ahead(1), threading.Event(), {}

    def make(number: int):
        makers[number] = threading.current_thread()
        if number == 0:
            assert go.wait(WAIT_S)
        if number == 2:
            go.set()
        return patches(number)

    first, *others = [ahead.begin(lambda number=number: make(number)) for number in range(3)]
    until(lambda: makers)
    first.take()
    assert makers[0] is not threading.current_thread()
    assert makers[1] is makers[2] is threading.current_thread()
    assert [one.take()[0][0].item() for one in others] == [1, 2]
    ahead.close()


def test_after_the_end_no_thread_is_left_and_nobody_waits_for_ever():
    ahead, go = Ahead(2), threading.Event()
    before = threading.active_count()
    begun = [ahead.begin(lambda number=number: go.wait(WAIT_S) and patches(number)) for number in range(6)]
    until(lambda: sum(one.begun for one in begun) == 2)
    ahead.close()
    go.set()
    assert [one.take()[0][0].item() for one in begun] == list(range(6))
    until(lambda: threading.active_count() <= before)


def test_who_interrupts_this_process_is_heard():
    ahead = Ahead(1)
    ahead.close()

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ahead.begin(interrupted).take()


def test_one_ahead():
    made = []

    def values(count):
        for number in range(count):
            made.append(number)
            yield number

    assert [(one, made[-1]) for one in one_ahead(values(4))] == [(0, 1), (1, 2), (2, 3), (3, 3)]
    assert list(one_ahead(values(0))) == [] and list(one_ahead(values(1))) == [0]


def test_threads_are_what_loading_processes_leave_of_a_rank_s_cores(monkeypatch):
    def threads(cores, ranks, workers):
        monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores))
        monkeypatch.setattr("ds_moe.data.workers.ranks_of_host", lambda: ranks)
        return image_threads(workers)

    assert [threads(2, None, workers) for workers in (0, 1, 2)] == [1, 1, 0]
    assert [threads(2, 2, workers) for workers in (0, 1)] == [1, 0]  # the one decodes while the device computes
    assert [threads(64, 8, workers) for workers in (0, 1, 2, 4, 8)] == [MOST_THREADS, MOST_THREADS, 3, 1, 0]


def until(true):
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


# --- what a run gets


@pytest.fixture
def path(write_jsonl, folder):
    """Records told apart by their answers: one, two or no image each, of many sizes; some cannot be used."""
    rng = np.random.default_rng(0)
    for number in range(RECORDS):
        size = (int(rng.integers(12, 90)), int(rng.integers(12, 90)), 3)
        image = Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))
        image.save(folder / f"{number}.png")
        image.save(folder / f"{number}.jpg")
    for name in ("4.png", "9.jpg"):  # cut off
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) * 3 // 4])
    (folder / "16.png").write_bytes(b"no image at all")
    records = []
    for number in range(RECORDS):
        names = [[f"{number}.png"], [f"{number}.jpg", "0.png"], []][number % 3]
        if number in (4, 9, 16):
            names = [{4: "4.png", 9: "9.jpg", 16: "16.png"}[number]]
        question = "<image>" * len(names) + "Is this a digit? " * (60 if number == 20 else 1 + number % 4)
        records.append({**chat(question, f"number {number}"), "images": names})
    return write_jsonl(records)


LIMITS = {"max_length": 300, "on_bad_record": "skip"}
STREAMS = {
    "indexed": {},
    "packed": {"packing": True},
    "streamed": {"streaming": True},
    "streamed, packed": {"streaming": True, "packing": True},
    "loading processes": {"num_workers": 2},
}


@pytest.fixture
def threads(monkeypatch):
    """`threads(count)`: so many in every process that loads; images take any time then."""

    def threads(count: int) -> None:
        def slow(sources, *arguments):
            time.sleep(random.random() / 300)
            return patches_of(sources, *arguments)

        monkeypatch.setattr(steps_module, "image_threads", lambda workers: count)
        if count:
            monkeypatch.setattr(encoder_module, "patches_of", slow)

    return threads


def taken(stream, steps):
    """Of each step its micro-batches' tensors, the bad records so far and the place behind it."""
    found = []
    for step in islice(stream, steps):
        tensors = [(batch.inputs, batch.labels, batch.real_B, batch.sequence_of_token) for batch in step]
        found.append((tensors, [*stream.skipped], stream.fill, json.loads(json.dumps(stream.state_dict()))))
    stream.close()
    return found


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(("what", "rank"), [*((what, 0) for what in STREAMS), ("streamed, packed", 1)])
def test_steps_are_the_same_with_any_number_of_threads_to_the_bit(path, run_config, processor, threads, what, rank):
    micro = {} if "packed" in what else {"micro_batch_size": 2}
    tokens = {"micro_batch_size": 1, "tokens_per_micro_batch": 600} if "packed" in what else {}

    def stream(folder):
        config = run_config(path, {**LIMITS, **STREAMS[what]}, **micro, **tokens, output_dir=str(path.parent / folder))
        return train_stream(config, processor, rank=rank, world_size=2)

    threads(0)
    expected = taken(stream("none"), STEPS)
    assert any("pixel_values" in inputs for tensors, *_ in expected for inputs, *_ in tensors)
    assert {bad.where.rsplit("/")[-1] for _, bad, *_ in expected[-1:] for bad in bad}
    for count in (1, 3):
        threads(count)
        found = taken(stream(f"{count}"), STEPS)
        assert same(found, expected)
    for number in (1, 4):  # resumed
        threads(2)
        resumed = stream("resumed")
        resumed.load_state_dict(expected[number - 1][-1])
        again = taken(resumed, STEPS - number)
        assert same([(one[0], one[-1]) for one in again], [(one[0], one[-1]) for one in expected[number:]])


def test_a_bad_image_ends_a_run_at_the_step_that_has_it(path, run_config, processor, threads):
    def ended(count):
        threads(count)
        config = run_config(path, {**LIMITS, "on_bad_record": "stop", "shuffle": False, "length_grouping": False})
        steps, stream = 0, train_stream(config, processor, rank=0, world_size=1)
        with pytest.raises(UserError) as error:
            for _ in stream:
                steps += 1
        return steps, str(error.value)

    path.write_text("\n".join(line for line in path.read_text().splitlines() if "4.png" not in line) + "\n")
    (path.parent / "16.png").write_bytes((path.parent / "0.png").read_bytes())
    expected = ended(0)
    assert expected[0] == 1 and "9.jpg" in expected[1]
    assert ended(1) == ended(3) == expected


def test_evaluation_is_the_same_and_reads_each_record_once(path, run_config, processor, monkeypatch):
    config = run_config(path, {**LIMITS, "eval": str(path)})
    eval_set = EvalSet(config, processor, rank=0, world_size=1)
    read, sample = [], eval_set._encoder._records.sample
    monkeypatch.setattr(eval_set._encoder._records, "sample", lambda index: read.append(index) or sample(index))
    expected = encoder_module.Encoder(config, eval_set._encoder._records, processor)
    found = list(eval_set.batches())
    assert sorted(read) == list(range(len(eval_set)))
    used, bad = [], []
    for number, one in enumerate(found):
        encoded, indices, of_batch = expected.encode(
            [index if index < len(eval_set) else -1 for index in range(number * 2, number * 2 + 2)]
        )
        batch = eval_set._record_kind.collate(encoded, processor)
        assert same(batch.inputs, one.batch.inputs) and same(batch.labels, one.batch.labels)
        used, bad = used + indices, bad + of_batch
    assert [one.where for batch in found for one in batch.samples] == [
        "filler" if index < 0 else eval_set._encoder.where(index) for index in used
    ]
    assert eval_set.skipped == [*eval_set._encoder._records.bad, *bad]


def test_small_data_that_are_kept_are_not_decoded_again(path, run_config, processor, monkeypatch):
    decoded = []

    def counted(sources, *arguments):
        decoded.append(sources[0].name)
        return patches_of(sources, *arguments)

    monkeypatch.setattr(encoder_module, "patches_of", counted)
    stream = train_stream(run_config(path, LIMITS), processor, rank=0, world_size=1)
    taken(stream, 4 * stream.steps_per_epoch)
    good = [name for name in decoded if name not in ("4.png", "9.jpg")]
    assert len(good) <= 2 * len(set(good))  # twice where an epoch's end lies between


@pytest.mark.slow
def test_a_loading_process_ends_without_the_images_that_nobody_will_ask_for(path, run_config, processor, monkeypatch):
    def slow(sources, *arguments):
        time.sleep(0.3)
        return patches_of(sources, *arguments)

    monkeypatch.setattr(steps_module, "image_threads", lambda workers: 1)
    monkeypatch.setattr(encoder_module, "patches_of", slow)
    settings = {**LIMITS, "num_workers": 1, "prefetch_factor": 1, "streaming": True}
    stream = train_stream(run_config(path, settings, global_batch_size=24), processor, rank=0, world_size=1)
    next(iter(stream))
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("pixels", [False, True])
def test_prepared_tokens_have_their_images_decoded_ahead(path, run_config, processor, pixels):
    config = run_config(path, {**LIMITS, "prepared": str(path.parent / "prepared")})
    records = records_of(config, "train")
    prepared = prepare(config, "train", records, processor, pixels=pixels, workers=0, note=lambda line: None)
    encoder = encoder_module.Encoder(config, records, processor, cache_bytes=0, prepared=prepared)
    plain = encoder_module.Encoder(config, records, processor, cache_bytes=0)
    indices, ahead = list(range(len(records))), Ahead(2)
    begun = [encoder.begin(index, ahead) for index in indices]
    with_images = [bool(records.sample(index).images) for index in indices]
    assert [one.images is not None for one in begun] == [not pixels and there for there in with_images]
    found, used, bad = encoder.finish(begun)
    expected = plain.encode(indices)
    assert same([vars(one) for one in found], [vars(one) for one in expected[0]]) and (used, bad) == expected[1:]
    assert bad and ahead._ready == 0
    ahead.close()


# --- how an image is opened


def test_a_file_is_opened_once(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    opened, plain = [], type(tmp_path).open
    monkeypatch.setattr(type(tmp_path), "open", lambda *arguments: opened.append(arguments) or plain(*arguments))
    monkeypatch.setattr(Image, "open", None)
    assert load_image(ImageSource("a.png", path=tmp_path / "a.png"), 2000).size == (40, 30)
    assert len(opened) == 1


def test_no_filter_of_warnings_is_touched_and_large_images_warn_nobody(monkeypatch):
    """Filters belong to the whole process: threads that each set and restore them would leave them wrong."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(warnings, "catch_warnings", None)
    stream = io.BytesIO()
    Image.new("RGB", (40, 30)).save(stream, "PNG")
    source = ImageSource("a.png", data=stream.getvalue())
    warnings.simplefilter("error")
    assert image_size(source, 2000) == (40, 30) == load_image(source, 2000).size
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(RecordError, match="1200 pixels.*exceeds limit of 1000 pixels.*shrink it"):
        image_size(source, 2000)
    assert images_module.FORMATS == tuple(form for form in images_module.FORMATS if form in Image.OPEN)
