"""Records of a gate: the adapter that they name, what is refused, requests without an answer, worker processes."""

import pickle
from itertools import islice
from pathlib import Path

import pytest
import torch

from ds_moe.data.encode import NO_LOSS, collate, collate_prompts, encode, filler
from ds_moe.data.eval_set import EvalSet
from ds_moe.data.images import RecordError
from ds_moe.data.record_kind import CHAT
from ds_moe.data.records import read_records
from ds_moe.data.stream import TrainStream
from ds_moe.errors import UserError
from ds_moe.tasks.gate.records import Requests, Routed
from ds_moe.tasks.gate.task import balanced
from tests.records import chat

NAMES = ["mail", "maps", "notes"]
QUESTION = {"messages": [{"role": "user", "content": "Where am I?"}]}
PLAIN = {"shuffle": False, "length_grouping": False}


def routed(adapter, question="Hi", **more):
    return {**chat(question), "adapter": adapter, **more}


def parse(record_kind, record):
    return record_kind.parse(record, "file:7", Path("/"))


@pytest.mark.parametrize("labelled", [True, False])
def test_a_record_names_its_adapter_which_is_its_kind_unless_it_has_one(labelled):
    record_kind = Routed(NAMES, labelled)
    sample = parse(record_kind, routed("maps"))
    plain = CHAT.parse(chat("Hi"), "file:7", Path("/"))
    assert (sample.adapter, sample.kind, sample.where, sample.turns) == ("maps", "maps", "file:7", plain.turns)
    assert parse(record_kind, routed("maps", kind="hard ones")).kind == "hard ones"
    assert record_kind.remember(sample) == "maps" and record_kind.estimate(sample, 100) == CHAT.estimate(plain, 100)


@pytest.mark.parametrize("record", [chat("Hi"), routed(None)])
def test_an_adapter_may_be_missing_only_where_no_label_is_learned(record):
    with pytest.raises(RecordError, match=r"no 'adapter' \(name the one that should answer: mail, maps, notes\)"):
        parse(Routed(NAMES, labelled=True), record)
    sample = parse(Routed(NAMES, labelled=False), record)
    assert sample.adapter is None and sample.kind is None


@pytest.mark.parametrize("adapter", ["Mail", "", 0, ["mail"], {"name": "mail"}])
@pytest.mark.parametrize("record_kind", [Routed(NAMES, True), Routed(NAMES, False), Requests(NAMES)])
def test_an_unknown_adapter_is_refused(record_kind, adapter):
    with pytest.raises(RecordError, match=r"'adapter' is .*none of the gate's \(use mail, maps, notes\)"):
        parse(record_kind, routed(adapter))


def test_the_file_and_its_line_are_named(write_jsonl, run_config):
    file = write_jsonl([routed("mail"), chat("Hi"), routed("male")])
    data = run_config(file).data
    with pytest.raises(UserError, match=rf"{file.name}:2: no 'adapter' .*and 1 more"):
        read_records(str(file), data, record_kind=Routed(NAMES, True))
    skipping = data.model_copy(update={"on_bad_record": "skip"})
    records = read_records(str(file), skipping, record_kind=Routed(NAMES, True))
    assert [str(bad).partition(" (")[0] for bad in records.bad] == [
        f"{file}:2: no 'adapter'",
        f"{file}:3: 'adapter' is 'male', which is none of the gate's",
    ]
    assert records.remembered == ["mail"] and records.kinds == ("mail",)
    assert read_records(str(file), skipping, record_kind=Routed(NAMES, False)).remembered == ["mail", None]


def test_a_micro_batch_has_the_index_of_each_adapter(processor, folder):
    record_kind = Routed(NAMES, labelled=False)
    records = [routed("notes", "<image>Which?", images=["a.png"]), chat("Hi"), routed("mail")]
    samples = [record_kind.parse(record, "file:1", folder) for record in records]
    encoded = [*(record_kind.encode(sample, processor, 512, 10**6) for sample in samples), filler(processor)]
    batch = record_kind.collate(encoded, processor)
    labels_B = batch.adapter_B
    assert labels_B.dtype == torch.int64 and labels_B.tolist() == [2, NO_LOSS, 0, NO_LOSS]
    plain = [*(encode(sample, processor, 512, 10**6) for sample in samples), filler(processor)]
    given, expected = batch.with_labels, collate(plain, processor).with_labels
    assert given.keys() == expected.keys() and all(given[key].equal(value) for key, value in expected.items())
    assert batch.real_B.tolist() == [True, True, True, False]
    prompts = collate_prompts(encoded, processor)
    assert encoded[0].kind == "notes" and prompts.inputs.keys() == batch.inputs.keys() - {"position_ids"}
    with pytest.raises(RecordError, match="over-long"):
        record_kind.encode(samples[0], processor, 5, 10**6)


@pytest.mark.parametrize("workers", [0, 1])
def test_streams_and_evaluations_bring_the_labels(write_jsonl, run_config, processor, workers):
    file = write_jsonl([routed("maps"), routed("notes"), routed("mail")])
    config = run_config(file, {**PLAIN, "eval": str(file), "num_workers": workers}, micro_batch_size=2)
    config.train.global_batch_size = 2
    record_kind = Routed(NAMES, labelled=True)
    stream = TrainStream(config, processor, rank=0, world_size=1, record_kind=record_kind)
    steps = [[batch.adapter_B.tolist() for batch in step] for step in islice(stream, 1)]
    assert steps == [[[1, 2]]] and stream.remembered == ["maps", "notes", "mail"]
    held_out = list(EvalSet(config, processor, rank=0, world_size=1, record_kind=record_kind).batches())
    assert [batch.batch.adapter_B.tolist() for batch in held_out] == [[1, 2], [0, NO_LOSS]]
    assert [batch.weights for batch in held_out] == [[1, 1], [1, 0]]


def test_a_request_needs_no_answer_and_an_answer_does_not_matter(processor):
    record_kind = Requests(NAMES)
    turns = [*QUESTION["messages"], {"role": "assistant", "content": "At home."}]
    sharegpt = [{"from": "human", "value": "Where am I?"}]
    records = [QUESTION, {"messages": turns}, {"conversations": sharegpt}, routed("maps", "Where am I?")]
    samples = [parse(record_kind, record) for record in records]
    assert [sample.adapter for sample in samples] == [None, None, None, "maps"]
    encoded = [record_kind.encode(sample, processor, 512, 10**6) for sample in samples]
    prompts = [one.input_ids[: one.prompt].tolist() for one in encoded]
    assert prompts == [prompts[0]] * 4
    assert processor.decode(prompts[0]).endswith("Where am I?<|im_end|>\n<|im_start|>assistant\n")
    assert QUESTION["messages"][-1]["role"] == "user"  # the record is as it was
    later = parse(record_kind, {"messages": [*turns, {"role": "user", "content": "And you?"}]})
    assert later.last_question() == "And you?" and len(later.turns) == 4


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ("Hi", "not an object"),
        ({}, "neither 'messages' nor 'conversations'"),
        ({"messages": []}, "is empty"),
        ({"messages": ["Hi"]}, "message 1 is a string"),
        ({**QUESTION, "conversations": []}, "both 'messages' and 'conversations'"),
        ({"messages": [{"role": "system", "content": "Be kind."}]}, "no assistant turn"),
    ],
)
def test_what_is_no_request_is_refused_as_any_record(record, why):
    with pytest.raises(RecordError, match=why):
        parse(Requests(NAMES), record)


@pytest.mark.parametrize("last", ["user", "tool"])
def test_labels_are_learned_from_questions_without_an_answer(processor, last):
    record_kind = Routed(NAMES, labelled=True)
    turns = [*QUESTION["messages"]]
    if last == "tool":
        turns += [{"role": "assistant", "content": "I look."}, {"role": "tool", "content": "7"}]
    sample = parse(record_kind, {"messages": turns, "adapter": "maps"})
    encoded = record_kind.encode(sample, processor, 512, 10**6)
    shown = processor.decode(encoded.input_ids[: encoded.prompt])
    assert encoded.adapter == 1 and shown.endswith(f"{turns[-1]['content']}<|im_end|>\n<|im_start|>assistant\n")
    assert [turn.role for turn in sample.turns] == [turn["role"] for turn in turns] + ["assistant"]


def test_answers_are_needed_where_none_is_made_up():
    with pytest.raises(RecordError, match="no assistant turn"):
        parse(Routed(NAMES, labelled=False), QUESTION)


@pytest.mark.parametrize("record_kind", [Routed(NAMES, True), Requests(NAMES)])
def test_data_workers_can_pickle_all_of_it(record_kind, processor):
    again = pickle.loads(pickle.dumps(record_kind))
    sample = parse(again, routed("notes"))
    assert pickle.loads(pickle.dumps(sample)) == sample == parse(record_kind, routed("notes"))
    encoded = pickle.loads(pickle.dumps(again.encode(sample, processor, 512, 10**6)))
    assert again.collate([encoded], processor).adapter_B.tolist() == [2] and again.remember(sample) == "notes"


def test_class_weights_are_balanced_over_what_a_mixture_draws(write_jsonl, run_config, processor):
    """Of every adapter the weights of an epoch's samples add up to the same, whatever the shares of the sources."""
    rare = write_jsonl([routed("mail")] * 3 + [routed("maps")] * 3, "rare.jsonl")
    common = write_jsonl([routed("maps")] * 10 + [routed("notes")] * 2, "common.jsonl")
    sources = [{"path": str(rare), "epochs": 4.0}, {"path": str(common), "epochs": 1.0}]
    config = run_config("unused", data={"train": sources}, global_batch_size=6)
    stream = TrainStream(config, processor, rank=0, world_size=1, record_kind=Routed(NAMES, labelled=True))
    weights_K = balanced(NAMES, stream.remembered, stream.rows.order.mixture)
    drawn = torch.cat([batch.adapter_B for step in islice(stream, stream.steps_per_epoch) for batch in step])
    total_K = torch.stack([weights_K[drawn[drawn == number]].sum() for number in range(3)])
    torch.testing.assert_close(total_K, torch.full((3,), 12.0))  # 36 samples
    assert torch.allclose(balanced(NAMES, ["mail", "maps", "maps", None]), torch.tensor([1.0, 0.5, 0.0]))
