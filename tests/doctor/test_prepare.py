"""`ds-moe data prepare`: what it prints and writes, what it refuses, and that a run says that it uses it."""

import json

import pytest
import yaml
from PIL import Image

from ds_moe.cli import main
from ds_moe.config.run_file import load_run
from ds_moe.data.stream import TrainStream
from ds_moe.models.load import processor_of
from tests.records import chat


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 24), "red").save("a.png")
    Image.new("RGB", (16, 16), "red").save("b.png")
    records = [{**chat("<image>What is this?"), "images": [name]} for name in ("a.png", "b.png", "a.png")]
    lines = [*map(json.dumps, [*records, chat("What is <|im_end|>?")]), "{broken"]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "eval.jsonl").write_text(json.dumps(chat("Hi")) + "\n")
    run = {
        "model": {"preset": "tiny-vl-moe"},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "on_bad_record": "skip", "video": {"fps": 1.0}},
        "moe": {},
        "train": {"output_dir": "out", "steps": 2, "micro_batch_size": 2, "global_batch_size": 4},
        "deepspeed": "zero3",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path / "run.yaml"


def test_a_report_and_a_run_that_uses_it(run_file, tmp_path, capfd):
    assert main(["data", "prepare", str(run_file), "--workers", "1"]) == 0
    said = capfd.readouterr().out
    folders = {path.name.rpartition("-")[0]: path for path in (tmp_path / "out/data_cache/prepared").glob("*-*")}
    assert set(folders) == {"train", "held-out"}
    assert "data.train: train.jsonl, 4 records" in said and "data.eval: eval.jsonl, 1 records" in said
    assert "images    3 in 3 records, 16x16 to 40x24 pixels" in said
    assert "texts write the special token <|im_end|> 1 times, which is split into pieces (it stays text" in said
    assert "bad       1 records" in said and "train.jsonl:5: broken JSON" in said
    assert "with images, as bytes" in said and "text alone" in said
    with Image.open(folders["train"] / "lengths.png") as picture:
        assert picture.size[0] > 500
    config = load_run(run_file)
    stream = TrainStream(config, processor_of(config.model, config.data.video), rank=0, world_size=1)
    assert stream.notes == [
        "prepared data.train: out/data_cache/prepared/" + folders["train"].name + ", 4 records with images"
    ]
    assert main(["data", "prepare", str(run_file), "--workers", "1"]) == 0
    assert capfd.readouterr().out.count("there already, and whole") == 2


def test_what_cannot_be_prepared_is_a_line(run_file, capfd):
    assert main(["data", "prepare", str(run_file), "data.train=nowhere.jsonl"]) == 2
    assert (
        capfd.readouterr().err
        == 'error: data: nowhere.jsonl does not exist (give a JSONL or Parquet file, or "digits")\n'
    )
    assert main(["data", "prepare", str(run_file), "data.prepared=/proc/nowhere"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: /proc/nowhere cannot be written") and error.count("\n") == 1
