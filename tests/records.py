"""Small data files, run configurations and the tiny processors: fixtures of tests/data and tests/tasks."""

import json

import pytest
from PIL import Image

from ds_moe.config.run import RunConfig
from ds_moe.models.processor import tiny_processor


@pytest.fixture(scope="session")
def processor():
    return tiny_processor("vl")


@pytest.fixture(scope="session")
def text_processor():
    return tiny_processor("text")


@pytest.fixture
def folder(tmp_path):
    """A data folder with the images a.png (16x16) and b.png (32x16)."""
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (16, 16), (250, 10, 10)).save(data / "a.png")
    Image.new("RGB", (32, 16), (10, 10, 250)).save(data / "b.png")
    return data


@pytest.fixture
def write_jsonl(folder):
    """write_jsonl(records) -> path; a record given as `str` is written as it stands."""

    def write(records, name="train.jsonl"):
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return folder / name

    return write


@pytest.fixture
def run_config(tmp_path):
    """run_config(train path, data={...}, train={...}) -> RunConfig writing below tmp_path / "run"."""

    def build(train, data=None, **train_options):
        options = {"output_dir": str(tmp_path / "run"), "micro_batch_size": 2, "global_batch_size": 8, **train_options}
        return RunConfig(
            model={"preset": "tiny-vl-moe"},
            data={"train": str(train), **(data or {})},
            train=options,
            deepspeed="ds_configs/zero3.json",
        )

    return build


def spoil(path, folder, *broken):
    """Of a file of records line 4 gets a truncated image, line 8 is over-long, and lines `broken` are broken JSON."""
    Image.effect_noise((16, 16), 90).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-60])
    lines = path.read_text().splitlines()
    lines[3] = lines[3].replace("a.png", "cut.png")
    lines[7] = lines[7].replace("Is this", "Is this a very long question indeed, which goes on and on, " * 9, 1)
    for number in broken:
        lines[number - 1] = lines[number - 1][:-9]
    path.write_text("\n".join(lines))
    return path


def chat(question, answer="yes"):
    """A record with one question and one answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def labelled(one, processor):
    """The labelled text, spans separated by |."""
    spans, last = [], None
    for position, (token, label) in enumerate(zip(one.input_ids.tolist(), one.labels.tolist(), strict=True)):
        if label == -100:
            continue
        assert label == token
        if last != position - 1:
            spans.append([])
        spans[-1].append(token)
        last = position
    return "|".join(processor.tokenizer.batch_decode(spans))
