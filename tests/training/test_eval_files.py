"""The files of an evaluation: what is not replaced, what is not written through, and what an error leaves."""

import json
import os
from pathlib import Path

import pytest

from ds_moe.training.eval_files import not_replaceable, partial_of, result_file, write_result, written_whole

SAMPLE = {"where": "held_out.jsonl:1", "kind": None, "question": "1+1", "answer": "2", "prediction": None}
RESULT = {"from": "runs/a", "eval_loss": 1.5}
CHAT = {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]}


def lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", lines(CHAT, CHAT)),  # data
        ("a.jsonl", lines(CHAT, SAMPLE)),
        ("a.jsonl", "precious\n"),
        ("a.json", json.dumps({"zero_optimization": {"stage": 3}})),  # --out a.jsonl writes a.json, too
        ("a.json", json.dumps({"eval_loss": 2.0, "loss": 1.0}, indent=1)),  # a training's result
        ("a.json", ""),
    ],
)
def test_a_file_that_no_evaluation_has_written_is_not_replaced(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    complaint = not_replaceable(tmp_path / "a.jsonl")
    assert complaint == f"{tmp_path / name} is there already, and no evaluation has written it; give --out another name"


def test_files_of_an_evaluation_are_replaced(tmp_path):
    out = tmp_path / "a.jsonl"
    for loss in (1.5, 2.5):
        assert not_replaceable(out) is None
        with written_whole(out) as text:
            text.write(lines(SAMPLE, SAMPLE))
        write_result(RESULT | {"eval_loss": loss}, result_file(out))
        assert json.loads((tmp_path / "a.json").read_text()) == RESULT | {"eval_loss": loss}
    assert out.read_text() == lines(SAMPLE, SAMPLE) and sorted(os.listdir(tmp_path)) == ["a.json", "a.jsonl"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_links_and_folders_are_not_written_to(tmp_path, name):
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    assert f"{name} is a link" in str(not_replaceable(tmp_path / "a.jsonl"))
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert f"{name} is a folder" in str(not_replaceable(tmp_path / "a.jsonl"))


def test_nothing_is_written_through_a_link_in_place_of_the_partial_file(tmp_path):
    precious, out = tmp_path / "precious", tmp_path / "a.jsonl"
    precious.write_text("precious")
    partial_of(out).symlink_to(precious)
    with written_whole(out) as text:
        text.write("new")
    assert (precious.read_text(), out.read_text(), out.is_symlink()) == ("precious", "new", False)


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    out = tmp_path / "a.jsonl"
    out.write_text("before")
    with pytest.raises(ValueError, match="bad record"), written_whole(out) as text:
        text.write("half")
        raise ValueError("bad record")
    assert out.read_text() == "before" and os.listdir(tmp_path) == ["a.jsonl"]


def test_two_evaluations_at_once_do_not_write_one_file(tmp_path, monkeypatch):
    out: Path = tmp_path / "a.jsonl"
    with written_whole(out) as first:
        first.write("first")
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with written_whole(out) as second:
            second.write("second")
        assert out.read_text() == "second"
        monkeypatch.undo()
    assert out.read_text() == "first"
