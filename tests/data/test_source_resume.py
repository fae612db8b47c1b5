"""Runs over every form of source that are killed at twenty points, and go on to the sample, on other ranks and workers.

In the place of a kill the streams are dropped with the loading processes at work, which have prepared steps that no
checkpoint counts. The last test is the negative control: `datasets`' own shuffle fails what all others pass.
"""

import datasets
import pytest

from ds_moe.data.stream import TrainStream
from tests.data.sources import FORMS, hub_cache, lines, records
from tests.data.streams import killed_at, never_stopped, random_points, read_on

RECORDS, STEPS = 47, 60  # with steps of 6: an epoch ends within every eighth step


@pytest.fixture
def sources(folder, tmp_path, monkeypatch):
    """sources(form) -> what data.train is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def build(form):
        if form == "hub":
            parts = records(20, "m"), records(RECORDS - 20)
            hub_cache(tmp_path, {f"data/train-{n:05}-of-00002.jsonl": lines(part) for n, part in enumerate(parts)})
            return "hub:some/chats"
        if form == "mixture":
            (folder / "few").mkdir()
            few = {"path": FORMS["parquet"](folder / "few", records(10, "few")), "weight": 1, "name": "few"}
            return [
                few,
                {"path": FORMS["jsonl"](folder, records(RECORDS)), "weight": 3},
                {"path": "digits", "weight": 0.5},
            ]
        return FORMS[form](folder, records(RECORDS))

    return build


def reader(train, run_config, processor, ranks, workers, **data):
    """A `Reader`, see `streams.py`: its n-th start has the n-th numbers of ranks and loading processes, in turns."""

    def read(state, start):
        world = ranks[start % len(ranks)]
        options = {"train": train, "max_length": 128, "num_workers": workers[start % len(workers)], **data}
        config = run_config("x", options, micro_batch_size=1, global_batch_size=6)
        streams = [TrainStream(config, processor, rank=rank, world_size=world) for rank in range(world)]
        return read_on(streams, state, processor)

    return read


@pytest.mark.parametrize(
    "data", [{}, pytest.param({"packing": True}, marks=pytest.mark.slow)], ids=["padded", "packed"]
)
@pytest.mark.parametrize(
    "form",
    [
        *("jsonl", "parquet", "hub", "mixture"),
        *(pytest.param(form, marks=pytest.mark.slow) for form in ("zst", "save_to_disk", "tar")),
    ],
)
def test_killed_at_twenty_points_equals_never_stopped(form, data, sources, run_config, processor):
    train = sources(form)
    expected = never_stopped(reader(train, run_config, processor, [1], [0], **data), STEPS)
    found = killed_at(
        random_points(STEPS, 20, seed=0), reader(train, run_config, processor, [1, 2, 3], [0], **data), STEPS
    )
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("form", ["jsonl", "parquet", "hub", "mixture"])
def test_killed_at_twenty_points_with_loading_processes(form, ranks, workers, sources, run_config, processor):
    train = sources(form)
    expected = never_stopped(reader(train, run_config, processor, [1], [0]), STEPS)
    found = killed_at(
        random_points(STEPS, 20, seed=ranks), reader(train, run_config, processor, [ranks], [workers]), STEPS
    )
    assert found == expected


def test_killed_with_loading_processes_on_changing_ranks(sources, run_config, processor):
    """A small representative of the matrix above."""
    train = sources("mixture")
    expected = never_stopped(reader(train, run_config, processor, [1], [0]), 20)
    found = killed_at([5, 12], reader(train, run_config, processor, [2, 1, 3], [1, 2, 0]), 20)
    assert found == expected


def shuffled_by_datasets(workers):
    """A `Reader` of `datasets`' own streaming, which shuffles by a buffer, on one rank."""

    def read(state, _):
        rows = datasets.Dataset.from_list([{"answer": f"n {number}"} for number in range(RECORDS * 8)])
        stream = rows.to_iterable_dataset(num_shards=4).shuffle(seed=0, buffer_size=20)
        if state is not None:
            stream.load_state_dict(state)
        batch = []
        for row in stream:
            batch.append(row["answer"])
            if len(batch) == 6:
                yield sorted(batch), stream.state_dict()
                batch = []

    return read


def test_negative_control_the_buffer_of_datasets_loses_samples():
    expected = never_stopped(shuffled_by_datasets(0), 40)
    found = killed_at(random_points(40, 5, seed=0), shuffled_by_datasets(0), 40)
    assert found != expected
    missing = {sample for step in expected for sample in step} - {sample for step in found for sample in step}
    assert missing
