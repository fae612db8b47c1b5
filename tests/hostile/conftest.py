"""For every test here: a canary that must not appear; data folders, streams and one tiny processor."""

import importlib
import json

import pytest
from PIL import Image

from ds_moe.config.run import RunConfig
from ds_moe.data.record_kind import CHAT
from ds_moe.data.stream import TrainStream
from ds_moe.models.processor import tiny_processor


@pytest.fixture(autouse=True)
def canary(tmp_path):
    """A path that payloads make a folder of when they run: none may."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code of the input was executed"


@pytest.fixture(scope="session", autouse=True)
def libraries():
    """Imported beforehand: no input is to blame for the seconds that takes."""
    for name in ("datasets", "peft"):
        importlib.import_module(name)


@pytest.fixture(scope="session")
def processor():
    return tiny_processor("vl")


@pytest.fixture
def folder(tmp_path):
    """A data root with the image good.png; beside it, outside, secret.png."""
    data = tmp_path / "data"
    data.mkdir()
    for path in (data / "good.png", tmp_path / "secret.png"):
        Image.new("RGB", (16, 16), (250, 10, 10)).save(path)
    return data


@pytest.fixture
def stream(tmp_path, processor):
    """stream(file, ...) -> the training stream of a data file, as a run has it."""

    def make(path, record_kind=CHAT, batch=1, **data):
        config = RunConfig(
            model={"preset": "tiny-vl-moe"},
            data={"train": str(path), "shuffle": False, "length_grouping": False, "max_pixels": 10**6, **data},
            train={"output_dir": str(tmp_path / "run"), "micro_batch_size": batch, "global_batch_size": batch},
            deepspeed="ds_configs/zero3.json",
        )
        return TrainStream(config, processor, rank=0, world_size=1, record_kind=record_kind)

    return make


def record(*images: str, text: str = "What is it?") -> dict:
    """A good record, but for its images."""
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]}


def line(*images: str, text: str = "What is it?") -> bytes:
    return json.dumps(record(*images, text=text)).encode()
