"""`data.streaming` in run files: what needs all records beforehand is refused in a line."""

import pytest

from ds_moe.config.run_file import load_run
from ds_moe.errors import UserError

RUN = """\
model:
  preset: tiny-vl-moe
data:
  train: [{path: a.jsonl, weight: 1}, {path: b.parquet, weight: 2}]
  streaming: true
train:
  steps: 10
deepspeed: zero.json
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero.json").write_text("{}")
    (tmp_path / "run.yaml").write_text(RUN)
    return lambda *overrides: load_run("run.yaml", list(overrides))


def test_a_streamed_mixture_is_read(load):
    data = load("data.shuffle_window_mb=64").data
    assert data.streaming and data.shuffle_window_mb == 64


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["train.steps=null", "train.epochs=1"], "train.epochs counts records, which data.streaming does not know"),
        (["task=dpo"], "data.streaming is for task sft: task dpo asks something of all records"),
        (["data.train=digits"], "data.streaming reads files, and data.train is digits"),
        (["data.mixture.temperature=2.0"], "data.mixture"),
        (["data.train=[{path: a.jsonl, epochs: 2.0}, b.jsonl]"], "epochs of a source counts records"),
        (["data.streaming=false", "data.shuffle_window_mb=8"], "data.shuffle_window_mb would not be used"),
        (["data.shuffle=false", "data.shuffle_window_mb=8"], "data.shuffle_window_mb would not be used"),
    ],
)
def test_what_needs_all_records_is_refused(load, overrides, complaint):
    with pytest.raises(UserError) as caught:
        load(*overrides)
    assert complaint in str(caught.value)
