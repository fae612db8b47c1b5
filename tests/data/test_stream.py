"""Order, sharding, resume and bad records of the training stream, and the evaluation set."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from multiprocessing import forkserver

import psutil
import pytest
import torch

from ds_moe.data.bad_records import BadRecordLog
from ds_moe.data.chat import BadRecord
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import NO_LOSS
from ds_moe.data.encoder import check_samples
from ds_moe.data.eval_set import EvalSet
from ds_moe.data.records import open_records
from ds_moe.data.stream import TrainStream
from ds_moe.errors import UserError
from ds_moe.faults.signals import SIGNALS
from ds_moe.training.set_up import forget_earlier_run
from tests.launcher import HANGS_S, ROOT
from tests.records import chat, spoil

RECORDS = 21  # with a global batch of 8: three steps an epoch, the last with three fillers
STEPS = 3


@pytest.fixture
def path(write_jsonl):
    """Records told apart by their answer's number; their lengths vary, every third has an image."""
    records = []
    for number in range(RECORDS):
        question = "Is this a digit? " * (1 + number % 7)
        record = chat(("<image>" if number % 3 == 0 else "") + question, f"number {number}")
        records.append({**record, "images": ["a.png"] if number % 3 == 0 else []})
    return write_jsonl(records)


def answers(batch, processor):
    """The answer of each row of a micro-batch; None for a row without labels."""
    rows = []
    for labels in batch.labels:
        kept = labels[labels != NO_LOSS]
        rows.append(processor.tokenizer.decode(kept).removesuffix("<|im_end|>") if len(kept) else None)
    return rows


def take(stream, steps, processor):
    """Per step the sorted answers of this rank, fillers as None."""
    return [[answers(batch, processor) for batch in step] for step in islice(stream, steps)]


def flat(step):
    return [answer for micro_batch in step for answer in micro_batch]


def whole_steps(config, processor, world_size, steps=2 * STEPS):
    """Per step the answers of all ranks together."""
    ranks = [
        take(TrainStream(config, processor, rank=rank, world_size=world_size), steps, processor)
        for rank in range(world_size)
    ]
    return [sorted(str(a) for rank in ranks for a in flat(rank[step])) for step in range(steps)]


@pytest.mark.parametrize("grouping", [True, False])
def test_every_world_size_and_micro_batch_size_gives_the_same_global_batches(path, run_config, processor, grouping):
    options = {"length_grouping": grouping}
    one = whole_steps(run_config(path, options), processor, 1)
    assert one == whole_steps(run_config(path, options), processor, 2)
    assert one == whole_steps(run_config(path, options), processor, 4)
    assert one == whole_steps(run_config(path, options, micro_batch_size=4), processor, 2)
    assert one == whole_steps(run_config(path, {**options, "num_workers": 2}), processor, 1)


def test_once_cuda_runs_loading_processes_are_forks_of_a_server_that_outlives_signals(
    path, run_config, processor, monkeypatch
):
    """Launchers signal every process that they find, and a rank needs its data until its checkpoint is written."""
    expected = whole_steps(run_config(path), processor, 1, steps=5)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    stream = TrainStream(run_config(path, {"num_workers": 1}), processor, rank=0, world_size=1)
    steps = iter(stream)
    found = take(steps, 1, processor)
    server = forkserver._forkserver._forkserver_pid
    [worker] = psutil.Process(server).children()
    for process in (server, worker.pid):
        for number in SIGNALS:
            os.kill(process, number)
    found += take(steps, 4, processor)
    assert [sorted(map(str, flat(step))) for step in found] == expected
    assert psutil.Process(server).children() == [worker] and worker.ppid() != os.getpid()
    stream.close()
    assert not worker.is_running()


def test_every_record_once_an_epoch_fillers_last_and_another_order_next_epoch(path, run_config, processor):
    stream = TrainStream(run_config(path), processor, rank=0, world_size=1)
    assert (stream.steps_per_epoch, len(stream.rows.of_step(0))) == (STEPS, 4)
    steps = take(stream, 2 * STEPS, processor)
    expected = Counter({f"number {number}": 1 for number in range(RECORDS)})
    for epoch in (steps[:STEPS], steps[STEPS:]):
        seen = Counter(answer for step in epoch for answer in flat(step))
        assert seen.pop(None) == 3 and seen == expected
        assert [flat(step).count(None) for step in epoch] == [0, 0, 3]
    assert [sorted(map(str, flat(step))) for step in steps[:STEPS]] != [
        sorted(map(str, flat(step))) for step in steps[STEPS:]
    ]
    assert all(len(batch.labels) == 2 for step in islice(stream, 3) for batch in step)


@pytest.mark.parametrize("workers", [0, 1])
def test_real_marks_what_is_no_filler(with_bad, run_config, processor, workers):
    config = run_config(with_bad, {**LIMITS, "num_workers": workers}, micro_batch_size=4)
    stream = TrainStream(config, processor, rank=0, world_size=1)
    batches = sum(islice(stream, STEPS), [])
    assert all(batch.real_B.dtype == torch.bool and batch.real_B.shape == (4,) for batch in batches)
    for batch in batches:  # fillers of the last batch and those for bad records alike
        assert batch.real_B.tolist() == [answer is not None for answer in answers(batch, processor)]
    assert sum(int(batch.real_B.sum()) for batch in batches) == RECORDS - 3


def test_kinds_of_records_travel_as_numbers(write_jsonl, run_config, text_processor):
    labels = [None, "web", "books", "web"]
    path = write_jsonl([chat("hi", f"{n}") | ({"kind": kind} if kind else {}) for n, kind in enumerate(labels)])
    config = run_config(path, micro_batch_size=5, global_batch_size=5)
    stream = TrainStream(config, text_processor, rank=0, world_size=1)
    assert stream.kinds == ("books", "web")
    [[batch]] = islice(stream, 1)
    kinds = dict(zip(answers(batch, text_processor), batch.kind_B.tolist(), strict=True))
    assert kinds == {"0": -1, "1": 1, "2": 0, "3": 1, None: -1}  # a filler has none either


def test_seed_decides_the_order_and_without_shuffle_it_is_the_file_s(path, run_config, processor):
    first, second, again = (whole_steps(run_config(path, seed=seed), processor, 1, STEPS) for seed in (0, 1, 0))
    assert first == again != second
    plain = run_config(path, {"shuffle": False, "length_grouping": False})
    steps = take(TrainStream(plain, processor, rank=0, world_size=1), STEPS, processor)
    assert [answer for step in steps for answer in flat(step)][:RECORDS] == [f"number {n}" for n in range(RECORDS)]


def test_grouping_puts_samples_of_like_length_together(path, run_config, processor):
    def padded(grouping):
        stream = TrainStream(run_config(path, {"length_grouping": grouping}), processor, rank=0, world_size=1)
        return sum(int((batch.inputs["attention_mask"] == 0).sum()) for step in islice(stream, STEPS) for batch in step)

    assert padded(True) < 0.6 * padded(False)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_goes_on_exactly_with_the_next_step(path, run_config, processor, workers, world_size):
    config = run_config(path, {"num_workers": workers})
    never_stopped = take(TrainStream(config, processor, rank=0, world_size=world_size), 8, processor)
    stream = TrainStream(config, processor, rank=0, world_size=world_size)
    steps = iter(stream)
    assert [[answers(batch, processor) for batch in next(steps)] for _ in range(4)] == never_stopped[:4]
    state = json.loads(json.dumps(stream.state_dict()))  # with workers, later steps are already prepared
    assert (state["epoch"], state["step"]) == (1, 1)
    resumed = TrainStream(config, processor, rank=0, world_size=world_size)
    resumed.load_state_dict(state)
    assert take(resumed, 4, processor) == never_stopped[4:]
    assert take(TrainStream(config, processor, rank=0, world_size=world_size), 4, processor) != never_stopped[4:]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_stream_draws_nothing_from_the_global_generator(path, run_config, processor, workers):
    stream = TrainStream(run_config(path, {"num_workers": workers}), processor, rank=0, world_size=1)
    before = torch.get_rng_state()
    take(stream, STEPS + 1, processor)
    assert torch.get_rng_state().equal(before)


def test_resume_on_another_world_size_goes_on_with_the_same_global_batches(path, run_config, processor):
    config = run_config(path)
    never_stopped = whole_steps(config, processor, 1, 6)
    stream = TrainStream(config, processor, rank=0, world_size=1)
    take(stream, 4, processor)
    ranks = [TrainStream(config, processor, rank=rank, world_size=4) for rank in range(4)]
    for rank in ranks:
        rank.load_state_dict(stream.state_dict())
    rows = [take(rank, 2, processor) for rank in ranks]
    assert [sorted(str(a) for row in rows for a in flat(row[step])) for step in range(2)] == never_stopped[4:]


def test_state_is_the_position_after_the_yielded_step(path, run_config, processor):
    stream = TrainStream(run_config(path), processor, rank=0, world_size=1)
    assert (stream.state_dict()["epoch"], stream.state_dict()["step"]) == (0, 0)
    for position, _ in enumerate(islice(stream, 4), start=1):
        state = stream.state_dict()
        assert (state["epoch"], state["step"]) == divmod(position, STEPS)


def test_a_lost_position_and_changed_data_are_refused(path, write_jsonl, run_config, processor):
    def fresh(train=path, data=None, **options):
        return TrainStream(run_config(train, data, **options), processor, rank=0, world_size=1)

    state = fresh().state_dict()
    for dropped in ("epoch", "step", "train.seed"):
        with pytest.raises(UserError, match=f"data position lacks '{dropped}'"):
            fresh().load_state_dict({key: value for key, value in state.items() if key != dropped})
    for other, key in [
        (fresh(seed=1), "train.seed was 0 in the checkpoint and is 1 now"),
        (fresh(global_batch_size=16), "train.global_batch_size was 8 in the checkpoint and is 16 now"),
        (fresh(data={"shuffle": False}), "data.shuffle"),
        (fresh(data={"length_grouping": False}), "data.length_grouping"),
        (fresh(write_jsonl([chat("hi")] * RECORDS, "other.jsonl")), "data.train sha256"),
    ]:
        with pytest.raises(UserError, match=key):
            other.load_state_dict(state)
    fresh(micro_batch_size=4).load_state_dict(state)  # does not touch the order


def test_batch_arithmetic_is_checked(path, run_config, processor):
    with pytest.raises(UserError, match=r"global_batch_size: 8 is no multiple of train.micro_batch_size 2 x 3 ranks"):
        TrainStream(run_config(path), processor, rank=0, world_size=3)


@pytest.fixture
def with_bad(path, folder):
    return spoil(path, folder, 12)


LIMITS = {"max_length": 128, "on_bad_record": "skip"}


@pytest.mark.parametrize("workers", [0, 1])
def test_skip_replaces_bad_records_by_fillers_and_lists_each_once(with_bad, run_config, processor, tmp_path, workers):
    config = run_config(with_bad, {**LIMITS, "num_workers": workers})
    streams = [TrainStream(config, processor, rank=rank, world_size=2) for rank in range(2)]
    assert [bad.where for bad in streams[0].skipped] == [f"{with_bad}:12"]
    epochs = [[flat(step) for step in take(stream, 2 * STEPS, processor)] for stream in streams]
    for epoch in range(2):
        seen = Counter(a for rank in epochs for step in rank[epoch * STEPS : (epoch + 1) * STEPS] for a in step)
        assert seen.pop(None) == 24 - 18 and set(seen.values()) == {1}
        assert set(seen) == {f"number {n}" for n in range(RECORDS) if n not in (3, 7, 11)}
    for stream in streams:  # in a later epoch the other rank may come across a record: it is listed once
        stream._log._known.clear()
        stream._log.note(streams[0].skipped + streams[1].skipped)
    listed = listed_records(tmp_path)
    assert sorted(record["where"].rsplit(":", 1)[1] for record in listed) == ["12", "4", "8"]
    assert {record["where"]: record["reason"] for record in listed} == {
        bad.where: bad.reason for stream in streams for bad in stream.skipped
    }
    reasons = " ".join(record["reason"] for record in listed)
    assert all(word in reasons for word in ("truncated image", "over-long", "broken JSON"))


def listed_records(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]


def test_another_run_s_bad_records_are_forgotten_and_a_resumed_run_s_are_kept(
    with_bad, path, run_config, processor, tmp_path
):
    config = run_config(with_bad, {**LIMITS, "eval": str(with_bad)})
    earlier = {"where": "earlier.jsonl:1", "reason": "of a run that has nothing to do with this one"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "bad_records.jsonl").write_text(json.dumps(earlier) + "\n")
    take(TrainStream(config, processor, rank=1, world_size=2), 1, processor)
    assert earlier in listed_records(tmp_path)  # only rank 0's set-up removes it, before any stream
    forget_earlier_run(config)
    take(TrainStream(config, processor, rank=0, world_size=1), STEPS, processor)
    EvalSet(config, processor, rank=0, world_size=1)
    assert [record["where"].rsplit(":", 1)[1] for record in listed_records(tmp_path)].count("12") == 1
    assert earlier not in listed_records(tmp_path) and len(listed_records(tmp_path)) == 3
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    forget_earlier_run(config)
    TrainStream(config, processor, rank=0, world_size=1)
    assert len(listed_records(tmp_path)) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_stop_without_raising_yields_the_step_and_keeps_the_error(with_bad, run_config, processor, tmp_path, workers):
    lines = with_bad.read_text().splitlines()
    with_bad.write_text("\n".join(lines[:11] + lines[12:]))
    config = run_config(with_bad, {"max_length": 128, "num_workers": workers, "eval": str(with_bad)})
    stream = TrainStream(config, processor, rank=0, world_size=1, raise_errors=False)
    assert stream.error is None
    errors, real = [], 0
    for step in islice(stream, STEPS):
        real += sum(int(batch.real_B.sum()) for batch in step)
        errors.append(stream.error)
    first = next(error for error in errors if error)
    assert first.startswith((f"{with_bad}:4: truncated", f"{with_bad}:8: over-long")) and "\n" not in first
    assert errors[-1] == first and real == RECORDS - 3
    held_out = EvalSet(config, processor, rank=0, world_size=1, raise_errors=False)
    assert held_out.error is None
    assert sum(sum(batch.weights) for batch in held_out.batches()) == RECORDS - 3
    assert str(held_out.error).startswith(f"{with_bad}:4: truncated image 'cut.png'")
    assert not (tmp_path / "run" / "bad_records.jsonl").exists()  # nothing was skipped
    with pytest.raises(UserError, match="truncated image"):
        list(EvalSet(config, processor, rank=0, world_size=1).batches())


def test_many_bad_records_are_taken_up_in_no_time(path, run_config):
    log = BadRecordLog(run_config(path, {"on_bad_record": "skip"}), [], rank=0)
    bad = [BadRecord(f"data.jsonl:{number}", "over-long") for number in range(20_000)]
    started = time.process_time()
    for start in range(0, len(bad), 100):
        log.note(bad[start : start + 100])
        log.note(bad[start : start + 100])
    assert log.records == bad
    assert time.process_time() - started < 5  # far longer where each is looked for in a list


@pytest.mark.parametrize("workers", [0, 1])
def test_stop_raises_one_line_also_out_of_a_worker(with_bad, run_config, processor, workers):
    with_bad.write_text("".join(line + "\n" for n, line in enumerate(with_bad.read_text().splitlines()) if n != 11))
    stream = TrainStream(run_config(with_bad, {"num_workers": workers}), processor, rank=0, world_size=1)
    with pytest.raises(UserError) as caught:
        take(stream, STEPS, processor)
    message = str(caught.value)
    assert message.startswith(f"{with_bad}:4: truncated image 'cut.png'") and "\n" not in message


def test_check_samples_finds_what_only_loading_shows(with_bad, run_config, processor):
    config = run_config(with_bad, LIMITS)
    records = open_records(str(with_bad), "train", config.data)
    found, lengths = check_samples(config, records, processor, range(len(records)))
    assert [bad.where for bad in found] == [f"{with_bad}:4", f"{with_bad}:8"]
    assert len(lengths) == RECORDS - 3 and 1 < min(lengths) < max(lengths) <= 128
    found, lengths = check_samples(config, records, processor, range(3))
    assert found == [] and len(lengths) == 3


def test_text_only_model_and_image_less_micro_batches(write_jsonl, run_config, text_processor, processor):
    path = write_jsonl([chat("hi", f"number {n}") for n in range(8)])
    for model, keys in [(text_processor, 3), (processor, 4)]:
        [step] = islice(TrainStream(run_config(path), model, rank=0, world_size=1), 1)
        assert all(len(batch.with_labels) == keys and "pixel_values" not in batch.inputs for batch in step)


def test_encoded_samples_are_kept_and_unchanged(path, run_config, processor):
    config = run_config(path)
    stream = TrainStream(config, processor, rank=0, world_size=1)
    first = list(islice(stream, STEPS))
    stream.load_state_dict({**stream.state_dict(), "epoch": 0, "step": 0})
    again = list(islice(stream, STEPS))
    assert len(stream._maker.encoder._cache) == RECORDS + 1
    for one, other in zip(sum(first, []), sum(again, []), strict=True):
        now, then = one.to(torch.device("cpu")).with_labels, other.to(torch.device("cpu")).with_labels
        assert now.keys() == then.keys() and all(torch.equal(value, then[key]) for key, value in now.items())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_gives_every_sample_once_in_equally_many_batches(path, run_config, processor, world_size):
    config = run_config(path, {"eval": str(path)}, eval_batch_size=4)
    sets = [EvalSet(config, processor, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [list(one.batches()) for one in sets]
    assert len({len(rank) for rank in batches}) == 1 and len(sets[0]) == RECORDS
    real = [a for rank in batches for b in rank for a, w in zip(b.answers, b.weights, strict=True) if w]
    assert sorted(real) == sorted(f"number {n}" for n in range(RECORDS))
    for batch in (b for rank in batches for b in rank):
        given = [answer or "" for answer in answers(batch.batch, processor)]
        assert batch.batch.real_B.tolist() == [bool(weight) for weight in batch.weights]
        assert batch.answers == given == [sample.answer for sample in batch.samples]
        assert [int(answer != "") for answer in given] == batch.weights
        [prompt] = batch.prompts()
        ends = processor.tokenizer.batch_decode(prompt.inputs["input_ids"])
        assert all(end.endswith("assistant\n") for end, w in zip(ends, batch.weights, strict=True) if w)
        assert len(prompt.inputs["input_ids"]) == len(batch.weights) == 4


def test_evaluation_limit_is_a_fixed_choice_that_ranks_share(run_config, processor):
    config = run_config("digits", {"eval": "digits"}, eval_batch_size=8)
    chosen = []
    for world_size in (1, 2):
        rows = [row for rank in range(world_size)
                for row in EvalSet(config, processor, rank=rank, world_size=world_size).batches(30)]  # fmt: skip
        assert sum(sum(row.weights) for row in rows) == 30
        chosen.append(sorted((s.images[0].name, s.kind) for row in rows for s in row.samples if s.where != "filler"))
    assert chosen[0] == chosen[1] and len(set(chosen[0])) == 30
    held_out = {sample.images[0].name for sample in digits_samples("held-out")}
    assert {name for name, _ in chosen[0]} <= held_out and len({kind for _, kind in chosen[0]}) == 3


def test_evaluation_skips_bad_records(with_bad, run_config, processor):
    config = run_config(with_bad, {**LIMITS, "eval": str(with_bad)}, eval_batch_size=4)
    held_out = EvalSet(config, processor, rank=0, world_size=1)
    for _ in range(2):
        assert sum(sum(batch.weights) for batch in held_out.batches()) == RECORDS - 3
        assert sorted(bad.where.rsplit(":", 1)[1] for bad in held_out.skipped) == ["12", "4", "8"]


def test_digits_stream_trains_on_no_held_out_image(run_config, processor):
    stream = TrainStream(
        run_config("digits", global_batch_size=64, micro_batch_size=64), processor, rank=0, world_size=1
    )
    assert stream.steps_per_epoch == -(-1437 * 3 // 64) and not stream.skipped
    [[batch]] = islice(stream, 1)
    assert batch.inputs["image_grid_thw"].tolist() == [[1, 4, 4]] * 64
    assert set(map(str.strip, answers(batch, processor))) <= {*"0123456789", "even", "odd", "yes", "no"}


CONSUMER = """
from ds_moe.config.run_file import load_run
from ds_moe.data.stream import TrainStream
from ds_moe.models.processor import tiny_processor

config = load_run("tests/runs/resume.yaml", ["data.num_workers=2", "train.micro_batch_size=2"])
steps = iter(TrainStream(config, tiny_processor(), rank=0, world_size=1))
next(steps)
raise RuntimeError("the consumer's own")  # `steps`, and with it the loader, outlives the exception
"""


@pytest.mark.slow
def test_a_program_that_fails_with_an_open_stream_ends():
    found = subprocess.run([sys.executable, "-c", CONSUMER], cwd=ROOT, capture_output=True, text=True, timeout=HANGS_S)
    assert found.returncode == 1 and "the consumer's own" in found.stderr
