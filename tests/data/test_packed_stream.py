"""What a rank trains on and is evaluated on where samples are packed into rows."""

import json
from collections import Counter
from itertools import islice

import pytest
import torch
from PIL import Image

from ds_moe.data.encode import NO_LOSS
from ds_moe.data.eval_set import EvalSet
from ds_moe.data.records import DATA_CACHE
from ds_moe.data.stream import TrainStream
from ds_moe.errors import UserError
from tests.records import chat, spoil

RECORDS, BATCH, CAPACITY = 21, 8, 160
STEPS = 3  # an epoch


@pytest.fixture
def path(write_jsonl):
    """Records told apart by their answer's number; their lengths vary, every third has an image."""
    records = []
    for number in range(RECORDS):
        record = chat(("<image>" if number % 3 == 0 else "") + "Is this a digit? " * (1 + number % 7), f"n {number}")
        records.append({**record, "images": ["a.png"] if number % 3 == 0 else []})
    return write_jsonl(records)


@pytest.fixture
def packed_config(run_config):
    def build(train, data=None, **options):
        config = run_config(train, {"packing": True, "max_length": 128, **(data or {})}, **options)
        config.train.tokens_per_micro_batch = options.get("tokens_per_micro_batch", CAPACITY)
        return config

    return build


def answers(batch, processor):
    """The answer of each sample of a packed row; None for a filler."""
    found = []
    for sample in range(batch.samples):
        kept = batch.labels[(batch.sequence_of_token == sample) & (batch.labels != NO_LOSS)]
        found.append(processor.tokenizer.decode(kept).removesuffix("<|im_end|>") if len(kept) else None)
    return found


def take(stream, steps, processor):
    return [[answers(batch, processor) for batch in step] for step in islice(stream, steps)]


def of_all(config, processor, world_size, steps=2 * STEPS):
    """(per step the answers of all ranks, per step how many micro-batches each rank has)."""
    streams = [TrainStream(config, processor, rank=rank, world_size=world_size) for rank in range(world_size)]
    ranks = [take(stream, steps, processor) for stream in streams]
    together = [sorted(str(a) for rank in ranks for row in rank[step] for a in row if a) for step in range(steps)]
    return together, [{len(rank[step]) for rank in ranks} for step in range(steps)]


def test_the_same_samples_make_a_step_on_any_number_of_ranks_and_equally_many_rows(path, packed_config, processor):
    padded = packed_config(path, {"packing": False})
    expected = of_all_padded = [sorted(one) for one in padded_steps(padded, processor)]
    counts = set()
    for world_size in (1, 2, 3, 5):
        steps, rows = of_all(packed_config(path), processor, world_size)
        assert steps == expected == of_all_padded
        assert all(len(of_step) == 1 for of_step in rows)
        counts |= {(world_size, *of_step) for of_step in rows}
    assert {rows for world_size, rows in counts if world_size == 1} > {3}  # steps differ in their micro-batches
    assert of_all(packed_config(path, {"num_workers": 2}), processor, 2)[0] == expected


def padded_steps(config, processor):
    stream = TrainStream(config, processor, rank=0, world_size=1)
    for step in islice(stream, 2 * STEPS):
        rows = [row[row != NO_LOSS] for batch in step for row in batch.labels]
        yield [processor.tokenizer.decode(row).removesuffix("<|im_end|>") for row in rows if len(row)]


def test_rows_hold_as_many_tokens_as_they_may_and_every_record_once_an_epoch(path, packed_config, processor):
    stream = TrainStream(packed_config(path), processor, rank=0, world_size=1)
    seen = Counter()
    for step in islice(stream, STEPS):
        for batch in step:
            assert batch.packed and batch.labels.shape[0] == 1 and batch.labels.shape[1] <= CAPACITY
            seen.update(answers(batch, processor))
    assert seen == Counter({f"n {number}": 1 for number in range(RECORDS)})
    assert stream.fill.steps == STEPS and 0.5 < stream.fill.share <= 1


def test_a_rank_without_samples_gets_a_filler(path, packed_config, processor):
    config = packed_config(path, global_batch_size=2)
    ranks = [next(iter(TrainStream(config, processor, rank=rank, world_size=4))) for rank in range(4)]
    real = [int(batch.real_B.sum()) for [batch] in ranks]
    assert sum(real) == 2 and 0 in real
    empty = ranks[real.index(0)][0]
    assert int(empty.label_tokens) == int(empty.tokens) == 0 and empty.labels.shape == (1, 1)


def test_the_samples_of_a_step_are_told_by_rank(path, packed_config, processor):
    config = packed_config(path)
    streams = [TrainStream(config, processor, rank=rank, world_size=2) for rank in range(2)]
    taken = [take(stream, 4, processor)[3] for stream in streams]
    told = streams[0].samples_of(3)
    for rank, of_rank in enumerate(taken):
        lines = [int(where.rpartition(":")[2]) for where in told[rank]]
        assert [f"n {line - 1}" for line in lines] == [answer for row in of_rank for answer in row if answer]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_goes_on_exactly_and_on_another_number_of_ranks_with_the_same_samples(
    path, packed_config, processor, workers
):
    config = packed_config(path, {"num_workers": workers})
    stream = TrainStream(config, processor, rank=0, world_size=2)
    steps = iter(stream)
    first = [next(steps) for _ in range(4)]
    state = json.loads(json.dumps(stream.state_dict()))
    stream.close()
    assert (state["epoch"], state["step"], state["data.packing"]) == (1, 1, True)
    never_stopped = list(islice(TrainStream(config, processor, rank=0, world_size=2), 6))
    resumed = TrainStream(config, processor, rank=0, world_size=2)
    resumed.load_state_dict(state)
    for again, batch in zip(islice(resumed, 2), never_stopped[4:], strict=True):
        assert len(again) == len(batch)
        for one, other in zip(again, batch, strict=True):
            assert one.labels.equal(other.labels) and one.inputs["input_ids"].equal(other.inputs["input_ids"])
    assert len(first) == 4
    expected = of_all(config, processor, 1)[0]
    for world_size in (1, 3):
        ranks = [TrainStream(config, processor, rank=rank, world_size=world_size) for rank in range(world_size)]
        for rank in ranks:
            rank.load_state_dict(state)
        rows = [take(rank, 2, processor) for rank in ranks]
        found = [sorted(a for rank in rows for row in rank[step] for a in row if a) for step in range(2)]
        assert found == expected[4:]


def test_a_change_of_the_rows_is_no_resume(path, packed_config, processor):
    def fresh(data=None, **options):
        return TrainStream(packed_config(path, data, **options), processor, rank=0, world_size=1)

    state = fresh().state_dict()
    with pytest.raises(UserError, match="train.tokens_per_micro_batch was 160 in the checkpoint and is 200 now"):
        fresh(tokens_per_micro_batch=200).load_state_dict(state)
    for new, old, message in [
        (fresh({"packing": False}), state, "data.packing was True in the checkpoint and is False now"),
        (fresh(), fresh({"packing": False}).state_dict(), "data.packing was False in the checkpoint and is True now"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            new.load_state_dict(old)
        assert "\n" not in str(caught.value)
    before = {key: value for key, value in fresh({"packing": False}).state_dict().items() if key != "data.packing"}
    fresh({"packing": False}).load_state_dict(before)  # a checkpoint from before packing


@pytest.fixture
def with_bad(path, folder):
    return spoil(path, folder)


def test_bad_records_are_skipped_and_listed_once(with_bad, packed_config, processor, tmp_path):
    config = packed_config(with_bad, {"on_bad_record": "skip"})
    streams = [TrainStream(config, processor, rank=rank, world_size=2) for rank in range(2)]
    assert [bad.where for bad in streams[0].skipped] == [f"{with_bad}:8"]  # a cut image is found when it is decoded
    seen = Counter(a for stream in streams for step in take(stream, STEPS, processor) for row in step for a in row if a)
    assert seen == Counter({f"n {n}": 1 for n in range(RECORDS) if n not in (3, 7)})
    listed = [json.loads(line)["where"] for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert sorted(listed) == [f"{with_bad}:4", f"{with_bad}:8"]
    with pytest.raises(UserError, match=r":8: over-long"):  # before anything is trained
        TrainStream(packed_config(with_bad), processor, rank=0, world_size=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_count_that_is_wrong_is_said_in_one_line_and_counted_anew(
    path, folder, packed_config, processor, workers, tmp_path
):
    config = packed_config(path, {"num_workers": workers})
    stream = TrainStream(config, processor, rank=0, world_size=1)
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    with pytest.raises(UserError) as caught:
        take(stream, STEPS, processor)
    message = str(caught.value)
    assert "tokens when they were counted and has" in message and "\n" not in message
    assert message.startswith(f"{path}:")
    assert not list((tmp_path / "run" / DATA_CACHE).glob("*.npz"))
    assert len(take(TrainStream(config, processor, rank=0, world_size=1), STEPS, processor)) == STEPS


def test_a_count_of_patches_that_is_wrong_is_said(path, packed_config, processor):
    stream = TrainStream(packed_config(path), processor, rank=0, world_size=1)
    stream.rows.patches[:] += 4
    with pytest.raises(UserError, match="patches when they were counted and has"):
        take(stream, STEPS, processor)


def held_out(config, processor, world_size, limit=None):
    sets = [EvalSet(config, processor, rank=rank, world_size=world_size) for rank in range(world_size)]
    return list(zip(*(one.batches(limit) for one in sets), strict=True))  # strict: equally many on every rank


@pytest.mark.parametrize(("world_size", "size"), [(1, 2), (2, 1), (3, 2)])
def test_held_out_rows_keep_the_order_of_the_file_and_ranks_generate_equally_often(
    path, packed_config, processor, world_size, size
):
    config = packed_config(path, {"eval": str(path)}, eval_batch_size=size)
    order, rows = [], 0
    for turn in held_out(config, processor, world_size):
        rows += len(turn)
        assert len({len(batch.asked) for batch in turn}) == 1
        for batch in turn:
            assert batch.batch.packed and batch.batch.labels.shape[1] <= CAPACITY
            assert all(len(prompt.labels) <= size for prompt in batch.prompts())
            real = sum(batch.weights)
            order += [sample.answer for sample, weight in zip(batch.samples, batch.weights, strict=True) if weight]
            assert batch.answers == [answer or "" for answer in answers(batch.batch, processor)]
            prompts = [row for prompt in batch.prompts() for row in prompt.inputs["input_ids"]]
            for row, sample in list(zip(prompts, batch.samples, strict=False))[:real]:
                assert sample.last_question() in processor.tokenizer.decode(row).replace("<|image_pad|>", "")
    assert order == [f"n {number}" for number in range(RECORDS)] and rows < RECORDS
    some = [s.answer for turn in held_out(config, processor, world_size, 5) for b in turn for s in b.samples]
    assert len([answer for answer in some if answer]) == 5
    padded = [EvalSet(config, processor, rank=0, world_size=1).batches(padded=True)]
    assert all(len(batch.asked) == 1 and not batch.batch.packed for one in padded for batch in one)


def test_packing_draws_nothing_from_the_global_generator(path, packed_config, processor):
    before = torch.get_rng_state()
    take(TrainStream(packed_config(path), processor, rank=0, world_size=1), 2, processor)
    assert torch.get_rng_state().equal(before)
