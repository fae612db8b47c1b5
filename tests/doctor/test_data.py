"""What the doctor says of data: bad records, special tokens, rollouts, packed rows, streams and mixtures."""

import json
from pathlib import Path

import pytest

from ds_moe.config.run_file import load_run
from ds_moe.data.stream import TrainStream
from ds_moe.models.processor import CHAT_TEMPLATE, tiny_processor
from tests.data.templates import with_template
from tests.doctor.broken_run import doctor, edit, packed_rows, records


def test_special_tokens_in_texts_are_named_with_the_key_that_keeps_them_whole(healthy, capsys, monkeypatch):
    processor = with_template(CHAT_TEMPLATE, "vl", special=("<|box_start|>", "<|box_end|>"))
    monkeypatch.setattr("ds_moe.models.processor.tiny_processor", lambda kind: processor)
    records()
    path = Path("bad/data.jsonl")
    path.write_text(path.read_text().replace('"7"', '"<|box_start|>7<|box_start|>"', 1))
    code, lines, _ = doctor(capsys)
    assert code == 0 and len(lines) == 1
    assert "<|box_start|> 2 times (first at bad/data.jsonl:1)" in lines[0]
    assert lines[0].endswith('; data.content_tokens: ["<|box_start|>"] keeps them whole')
    edit("max_length: 64", 'max_length: 64\n  content_tokens: ["<|box_start|>"]')
    assert doctor(capsys)[:2] == (0, [])
    path.write_text(path.read_text().replace("Which digit", "<|im_start|>Which digit", 1))
    _, [line], _ = doctor(capsys)
    assert "<|im_start|> 1 times" in line and line.endswith("; the chat template uses them, so they stay text")
    edit('["<|box_start|>"]', '["<|im_end|>"]')
    code, lines, _ = doctor(capsys)
    assert code == 1 and "data.content_tokens: '<|im_end|>' is a control token of the chat template" in lines[0]


def test_lines_about_bad_records_name_what_helps(healthy, capsys):
    skip = "; data.on_bad_record: skip goes on without"
    image = '{"messages": [{"role": "user", "content": "<image>"}], "images": ["%s.png"]}'
    records("{", *(image % number for number in range(6)), image % "../outside")
    _, lines, _ = doctor(capsys)
    assert len(lines) == 6 and all(line.endswith(skip) for line in lines)
    assert all("; set data.root)" in line for line in lines[1:5]) and "and 3 more bad records" in lines[5]
    edit("max_length: 64", "max_length: 64\n  on_bad_record: skip")
    code, lines, _ = doctor(capsys)
    assert code == 0 and len(lines) == 6 and not any(skip in line for line in lines)


@pytest.mark.parametrize("rewards, level", [([1, 1, 0, 0], "warning"), ([1, 0, 0, 1], "ok")])
def test_rollouts_that_teach_nothing_are_warned_of(healthy, capsys, rewards, level):
    record = {"tokens": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1], "logprobs": [-0.5, -1.5]}
    outcomes = zip("aabb" * 8, rewards * 8, strict=True)
    lines = [json.dumps(record | {"group": group, "reward": reward}) for group, reward in outcomes]
    Path("rollouts.jsonl").write_text("\n".join(lines))
    edit("train: digits", "train: rollouts.jsonl")
    edit("deepspeed: zero.json", "task: rl\ndeepspeed: zero.json")
    _, lines, everything = doctor(capsys)
    equal = 2 if level == "warning" else 0
    assert f"rewards   mean 0.5, std 0.5, 0 to 1 over 32 rollouts; equal in {equal} of 2 groups" in everything
    warned = [line for line in lines if "teaches nothing" in line]
    assert len(warned) == (level == "warning")
    assert all(line.startswith("warning  run.yaml:4: data.train: a group of equal rewards") for line in warned)


def test_packed_rows_are_told_from_some_records_or_from_all_that_a_run_has_counted(healthy, capsys):
    edit("max_length: 64", "max_length: 64\n  packing: true")
    packed_rows(128)
    edit("global_batch_size: 16", "global_batch_size: 64\n  output_dir: out")
    code, lines, output = doctor(capsys)
    assert code == 0 and not lines, lines
    batch = next(line for line in output.splitlines() if "batch: packed into rows of 128 tokens: 64 samples" in line)
    found = next(line for line in output.splitlines() if "packing:" in line)
    assert batch and "% full" in found and "% of the critical path are real tokens (by the tokens of 2 records" in found
    config = load_run("run.yaml")
    TrainStream(config, tiny_processor("vl"), rank=0, world_size=2)
    assert "(by the tokens of all records" in doctor(capsys)[2]
    edit("tokens_per_micro_batch: 128", "tokens_per_micro_batch: 32")
    code, lines, _ = doctor(capsys)
    assert code == 1 and "train.tokens_per_micro_batch 32 is less than data.max_length 64" in lines[0]


def test_streamed_data_are_looked_at_without_a_pass(healthy, capsys):
    records("{broken")
    edit("max_length: 64", "max_length: 64\n  streaming: true")
    code, lines, output = doctor(capsys)
    assert code == 0 and not lines and "data.train: streamed: 0.0 MB in 1 file, about 31 records" in output
    edit("micro_batch_size: 4", "tokens_per_micro_batch: 512")
    code, lines, output = doctor(capsys, "data.packing=true")
    assert code == 0 and "packing: " in output


def test_what_an_epoch_has_of_each_source_is_said(healthy, capsys):
    line = json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]})
    Path("some.jsonl").write_text(f"{line}\n" * 40)
    edit(
        "  train: digits\n",
        "  train: [{path: digits, weight: 1}, {path: some.jsonl, weight: 3}]\n  mixture: {epoch: shortest}\n",
    )
    code, found, output = doctor(capsys)
    assert (code, found) == (0, [])
    assert "an epoch has 53 records: digits 13 (24.5%; has 4,311), some 40 (75.5%; has 40)" in " ".join(output.split())
    edit("weight: 1}", "weight: 0.001}")
    code, [complaint], _ = doctor(capsys)
    assert code == 1 and "run.yaml:4: data: an epoch of 40 records has none of 'digits'" in complaint
