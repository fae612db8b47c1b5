"""`data.streaming`: the same samples make a step on any number of ranks and workers, and a run that is killed at any
point goes on with the next one. test_source_resume.py has the negative control: `datasets`' own shuffle fails."""

import json
from collections import Counter
from contextlib import closing
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_moe.data import blocks as blocks_module
from ds_moe.data import pools
from ds_moe.data.pools import FirstRecords, Pools, sources_of_run
from ds_moe.data.position import FILE, position_problems
from ds_moe.data.record_kind import CHAT
from ds_moe.data.stream import TrainStream
from ds_moe.data.streaming import StreamedTrain
from ds_moe.errors import UserError
from tests.data.sources import COMMIT, hub_cache, lines
from tests.data.sources import records as plain_records
from tests.data.streamed_data import FORMS, RECORDS, data_of, records
from tests.data.streams import answers, killed_at, never_stopped, random_points, read_on
from tests.records import chat

BATCH, STEPS = 6, 32  # 25 steps an epoch
LIMITS = {"streaming": True, "max_length": 128, "shuffle_window_mb": 4}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of half a KiB, windows of 4 KiB: some ten windows of eight blocks."""
    monkeypatch.setattr(blocks_module, "BLOCK", 512)
    monkeypatch.setattr(pools, "MIB", 1024)


@pytest.fixture
def path(write_jsonl):
    return write_jsonl(records())


@pytest.fixture
def given(folder):
    """given(form) -> what data.train is."""
    return lambda form: data_of(form, folder)


@pytest.fixture
def config(run_config, folder):
    def build(train, data=None, **options):
        data = {
            **LIMITS,
            "root": str(folder),
            "train": train if isinstance(train, list) else str(train),
            **(data or {}),
        }
        config = run_config(train, data, **{"global_batch_size": BATCH, **options})
        config.train.steps = 1000
        return config

    return build


def reader(config, processor, ranks, workers=(0,)):
    """A `Reader`: its n-th start has so many ranks and loading processes as the n-th of the lists says, in turns."""

    def read(state, start):
        world = ranks[start % len(ranks)]
        chosen = config.model_copy(deep=True)
        chosen.data.num_workers = workers[start % len(workers)]
        streams = [StreamedTrain(chosen, processor, rank=rank, world_size=world) for rank in range(world)]
        return read_on(streams, state, processor)

    return read


def test_every_record_once_an_epoch_and_a_step_goes_over_its_end(path, config, processor):
    steps = never_stopped(reader(config(path, global_batch_size=40), processor, [1]), 8)
    of_all, seen = Counter(f"n {number}" for number in range(RECORDS)), Counter(sum(steps, []))
    assert [len(step) for step in steps] == [40] * 8 and set(seen.values()) == {2, 3} and set(seen) == set(of_all)
    whole = never_stopped(reader(config(path, global_batch_size=30), processor, [1]), 10)
    epochs = [Counter(sum(steps, [])) for steps in (whole[:5], whole[5:])]
    assert epochs == [of_all, of_all] and whole[:5] != whole[5:]


@pytest.mark.parametrize("data", [{}, {"packing": True}, {"length_grouping": False}], ids=["padded", "packed", "plain"])
def test_the_same_samples_make_a_step_on_any_number_of_ranks_and_workers(path, config, processor, data):
    expected = never_stopped(reader(config(path), processor, [1]), 12)
    for ranks, workers in ((1, 0), (2, 0), (3, 0), (2, 2)):
        one = config(path, data, micro_batch_size=1)
        assert never_stopped(reader(one, processor, [ranks], [workers]), 12) == expected


@pytest.mark.parametrize(
    ("form", "data"),
    [("jsonl", {}), ("jsonl", {"packing": True}), ("parquet", {}), ("saved", {}), ("mixture", {"packing": True})],
    ids=["jsonl", "jsonl, packed", "parquet", "saved", "mixture, packed"],
)
def test_killed_at_twenty_points_equals_never_stopped(form, data, given, config, processor):
    """Each time on another number of ranks; with loading processes below."""
    one = config(given(form), data, micro_batch_size=1)
    expected = never_stopped(reader(one, processor, [1]), STEPS)
    assert killed_at(random_points(STEPS, 20, seed=0), reader(one, processor, [1, 2, 3]), STEPS) == expected


@pytest.mark.parametrize("form", ["jsonl", *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:])])
@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_killed_at_twenty_points_with_loading_processes(form, given, config, processor, workers, ranks):
    """These have prepared steps that the run has not taken when it is killed."""
    one = config(given(form), micro_batch_size=1)
    expected = never_stopped(reader(one, processor, [1]), STEPS)
    cheap = (form, workers, ranks) == ("jsonl", 2, 2)
    points = random_points(STEPS, 3 if cheap else 20, seed=ranks)
    assert killed_at(points, reader(one, processor, [ranks], [workers]), STEPS) == expected


def test_on_the_same_ranks_a_resumed_run_has_the_same_tensors(path, config, processor):
    for data in ({}, {"packing": True}):
        given = config(path, data, micro_batch_size=1)
        whole = list(islice(StreamedTrain(given, processor, rank=1, world_size=2), 12))
        stream = StreamedTrain(given, processor, rank=1, world_size=2)
        list(islice(stream, 7))
        resumed = StreamedTrain(given, processor, rank=1, world_size=2)
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        for step, expected in zip(resumed, whole[7:], strict=False):
            assert len(step) == len(expected)
            for one, other in zip(step, expected, strict=True):
                assert one.labels.equal(other.labels)
                assert all(str(one.inputs[name]) == str(other.inputs[name]) for name in other.inputs)


# --- several sources


def test_sources_are_mixed_by_weight_and_their_names_are_the_kinds(given, config, processor):
    one = config(given("mixture"), micro_batch_size=3)
    stream = StreamedTrain(one, processor, rank=0, world_size=1)
    assert stream.kinds == ("hub", "other")
    small = []
    for step in islice(stream, 40):
        kinds = [kind for batch in step for kind in batch.kind_B.tolist()]
        found = [answer for batch in step for answer in answers(batch, processor)]
        assert sorted(kinds) == [0] * 4 + [1] * 2
        assert [kind == 1 for kind in kinds] == [answer.startswith("m") for answer in found]
        small += [answer for answer in found if answer.startswith("m")]
    assert Counter(small) == Counter({f"m {number}": 2 for number in range(40)}) and small[:40] != small[40:]


def test_without_weights_all_sources_are_one_pool(given, config, processor):
    train = [one["path"] for one in given("mixture")]
    steps = never_stopped(reader(config(train, global_batch_size=10), processor, [1]), 19)
    assert Counter(sum(steps, [])) == Counter([f"n {n}" for n in range(150)] + [f"m {n}" for n in range(40)])


def test_other_weights_and_a_changed_source_are_refused_by_name(given, config, processor, folder):
    train = given("mixture")
    state = StreamedTrain(config(train), processor, rank=0, world_size=1).state_dict()
    other = [train[0], {**train[1], "weight": 3}]
    with pytest.raises(UserError, match="weights of the sources was '2.0, 1.0' .* and is '2.0, 3.0' now"):
        StreamedTrain(config(other), processor, rank=0, world_size=1).load_state_dict(state)
    with open(folder / "other.jsonl", "a") as file:
        file.write(json.dumps(chat("more", "m 40")) + "\n")
    with pytest.raises(UserError, match="data.train.1 sha256 was"):
        StreamedTrain(config(train), processor, rank=0, world_size=1).load_state_dict(state)


def test_columns_of_other_names_are_read_and_misspelt_ones_refused(write_jsonl, config, processor):
    rows = [{"talk": chat("Is this a digit?", f"n {number}")["messages"]} for number in range(12)]
    path = str(write_jsonl(rows))
    steps = never_stopped(reader(config([{"path": path, "columns": {"messages": "talk"}}]), processor, [1]), 2)
    assert sorted(sum(steps, [])) == sorted(f"n {number}" for number in range(12))
    with pytest.raises(UserError, match="columns.messages names 'tlak', which the first records of .* lack"):
        StreamedTrain(config([{"path": path, "columns": {"messages": "tlak"}}]), processor, rank=0, world_size=1)
    later = {"path": path, "columns": {"messages": "talk", "tools": "functions"}}  # which a later record may have
    stream = StreamedTrain(config([later]), processor, rank=0, world_size=1)
    assert "columns.tools names 'functions', which the first records of" in stream.outlook()


@pytest.mark.parametrize("workers", [[0], pytest.param([0, 2, 4], marks=pytest.mark.slow)], ids=str)
def test_a_dataset_of_the_hub_is_streamed(tmp_path, monkeypatch, config, processor, workers):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shards = [plain_records(20, name) for name in "ab"]
    hub_cache(tmp_path, {f"data/train-{n:05}-of-00002.jsonl": lines(shard) for n, shard in enumerate(shards)})
    one = config([{"path": "hub:some/chats", "revision": COMMIT}], micro_batch_size=1, global_batch_size=6)
    expected = never_stopped(reader(one, processor, [1]), STEPS)
    thrice = [f"{name} {number}" for name in "ab" for number in range(20)] * 3
    assert Counter(sum(expected[:20], [])) == Counter(thrice)
    points = random_points(STEPS, 20, seed=0)
    assert killed_at(points, reader(one, processor, [1, 2, 3], workers), STEPS) == expected


# --- what a run asks


def test_bad_records_are_fillers_and_listed_once_with_their_byte(path, config, processor, tmp_path):
    lines = path.read_text().splitlines()
    lines[11] = lines[11][:-9]
    lines[40] = lines[40].replace("Is this", "Is this a very long question indeed, which goes on and on, " * 9, 1)
    path.write_text("\n".join(lines))
    places = [len("\n".join([*lines[:row], ""]).encode()) for row in (11, 40)]
    for data in ({}, {"packing": True}):
        given = config(path, {**data, "on_bad_record": "skip"}, micro_batch_size=1)
        streams = [StreamedTrain(given, processor, rank=rank, world_size=2) for rank in range(2)]
        seen = Counter()
        for step in islice(zip(*streams, strict=True), 25):
            assert len({len(rank) for rank in step}) == 1
            seen.update(a for rank in step for batch in rank for a in answers(batch, processor))
        fillers = seen.pop(None, 0)
        assert seen == Counter(f"n {n}" for n in range(RECORDS) if n not in (11, 40)) and (data or fillers == 2)
        found = [bad.where for stream in streams for bad in stream.skipped]
        assert sorted(found) == sorted(f"{path}@{place}" for place in places)
        listed = (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["where"] for line in listed) == sorted(found)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_record_ends_the_run_and_names_its_place(path, config, processor, workers):
    text = path.read_text().replace('"n 7"', '"n 7')
    path.write_text(text)
    stream = StreamedTrain(config(path, {"num_workers": workers}), processor, rank=0, world_size=1)
    with closing(stream), pytest.raises(UserError) as caught:
        list(islice(stream, 25))
    place = len(text.partition('"n 7')[0].rpartition("\n")[0].encode()) + 1
    assert str(caught.value).startswith(f"{path}@{place}: broken JSON")


def test_the_samples_of_a_step_are_told_by_rank(path, config, processor):
    for data in ({}, {"packing": True}):
        given = config(path, {**data, "num_workers": 1}, micro_batch_size=1)
        streams = [StreamedTrain(given, processor, rank=rank, world_size=2) for rank in range(2)]
        taken = [list(islice(stream, 9))[8] for stream in streams]
        text = path.read_bytes()
        for rank, places in enumerate(streams[1].samples_of(8)):
            lines = [text[int(where.partition("@")[2]) :].partition(b"\n")[0] for where in places]
            told = [json.loads(line)["messages"][1]["content"] for line in lines]
            assert told == [a for batch in taken[rank] for a in answers(batch, processor) if a]


def test_what_is_known_before_a_pass(path, config, processor):
    stream = StreamedTrain(config(path), processor, rank=0, world_size=1)
    assert (stream.steps_per_epoch, stream.rows, stream.remembered, stream.kinds) == (None, None, [], ())
    assert "1 file, about 1" in stream.outlook() and "records, by 1 of " in stream.outlook()
    first = FirstRecords(config(path), CHAT, 10)
    assert len(first) == 10 == len({first.sample(row).answer for row in range(10)})
    step = next(iter(StreamedTrain(config(path, {"length_grouping": False}), processor, rank=0, world_size=1)))
    assert [a for batch in step for a in answers(batch, processor)] == [first.sample(row).answer for row in range(6)]


def test_other_data_and_other_orders_are_refused(path, write_jsonl, config, run_config, processor):
    def fresh(train=path, data=None, **options):
        return StreamedTrain(config(train, data, **options), processor, rank=0, world_size=1)

    state = {**fresh().state_dict(), "step": 5}
    for other, key in [
        (fresh(data={"shuffle_window_mb": 8}), "data.shuffle_window_mb was 4 in the checkpoint and is 8 now"),
        (fresh(seed=1), "train.seed"),
        (fresh(global_batch_size=12), "train.global_batch_size"),
        (fresh(data={"shuffle": False}), "data.shuffle"),
        (fresh(data={"packing": True}), "data.packing"),
        (fresh(write_jsonl(list(records())[::-1])), "data.train sha256"),
    ]:
        with pytest.raises(UserError, match=key):
            other.load_state_dict(state)
    write_jsonl(records())
    for places in (None, [], [[0, 0, 0]], [[0, 0, 0, -1]], [[0, 0, 0, 0]] * 2):
        with pytest.raises(UserError, match="data position has places"):
            fresh().load_state_dict({**state, "places": places})


def test_an_indexed_run_does_not_go_on_as_a_streamed_one(path, config, run_config, processor):
    indexed = TrainStream(run_config(path, global_batch_size=BATCH), processor, rank=0, world_size=1)
    streamed = StreamedTrain(config(path), processor, rank=0, world_size=1)
    with pytest.raises(UserError, match="data.streaming was False in the checkpoint and is True now"):
        streamed.load_state_dict(indexed.state_dict())
    with pytest.raises(UserError, match="data.streaming was True in the checkpoint and is False now"):
        indexed.load_state_dict(streamed.state_dict())


def test_sources_have_columns_roots_and_outlooks_of_their_own(folder, config, monkeypatch, tmp_path):
    """An optional column may begin late; a hub dataset's root lies within it; sizes are estimated by source."""
    rows = list(records())
    late = [{**row, "images": []} for row in rows[:149] if "<image>" not in str(row)] + [{**chat("x", "y"), "pic": []}]
    file = folder / "late.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in late))
    Pools.of(config([{"path": str(file), "columns": {"images": "pic"}}]))
    Pools.of(config([{"path": str(file), "columns": {"messages": "chats"}}]))  # they have messages
    file.write_text('{"chat": []}\n' * 9)
    with pytest.raises(UserError, match="columns.messages names 'chats'"):
        Pools.of(config([{"path": str(file), "columns": {"messages": "chats"}}]))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_cache(tmp_path, {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(), "images/x": b""})
    [source] = sources_of_run(config([{"path": "hub:some/chats", "root": "images"}]))
    assert source.root is None and str(source.files[0].root.base) == "images"
    monkeypatch.setattr(blocks_module, "BLOCK", 2**17)
    lengths = {"short": 1, "long": 50}
    for name, times in lengths.items():
        (folder / f"{name}.jsonl").write_text((json.dumps({"a": "x" * 20 * times}) + "\n") * 100)
    given = [{"path": str(folder / f"{name}.jsonl"), "weight": 1} for name in lengths]
    assert "about 200 records" in Pools.of(config(given)).outlook()
    pq.write_table(pa.table({"number": list(range(50))}), folder / "n.parquet")
    assert "0.0 MB in 1 file" in Pools.of(config(str(folder / "n.parquet"))).outlook()


def test_one_source_and_two_are_told_apart_by_their_files(given, config):
    one, two = (
        FirstRecords(config(given(form)), CHAT, 1).order | {"epoch": 0, "step": 0} for form in ("jsonl", "mixture")
    )
    for saved, now in ((one, two), (two, one)):
        problems = position_problems(saved, {key: now[key] for key in now if key not in ("epoch", "step")})
        assert any("data.train.0 sha256 was" in line for line in problems)
        assert not any("lacks" in line or FILE in line for line in problems)


def test_the_first_records_in_the_order_of_a_run_are_of_all_sources(given, config):
    first = FirstRecords(config(given("mixture")), CHAT, 10)
    assert [first.rows[index].source for index in first.in_order(6)] == [0, 1, 0, 0, 1, 0]
    assert len(set(first.in_order(18))) == 16  # of the larger source there are ten
