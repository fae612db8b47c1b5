"""The routing manifest: what is written, and what is refused."""

import json
from pathlib import Path

import pytest

from ds_moe.errors import UserError
from ds_moe.tasks.gate.serving import Route, write_manifest

ADAPTERS = {"ocr": Path("/runs/ocr"), "bildschirm-ü": Path("/runs/screen, old=1")}
ROUTES = (Route("a.jsonl:7", "bildschirm-ü", 0.93), Route("a.jsonl:8", "ocr", 1.0), Route("a.jsonl:7", "ocr", 0.5))
GOOD = {
    "format": 1,
    "adapters": [
        {"lora_name": "ocr", "lora_int_id": 1, "lora_path": "/runs/ocr"},
        {"lora_name": "bildschirm-ü", "lora_int_id": 2, "lora_path": "/runs/screen, old=1"},
    ],
    "requests": [
        {"request": "a.jsonl:7", "lora_name": "bildschirm-ü", "lora_int_id": 2, "probability": 0.93},
        {"request": "a.jsonl:8", "lora_name": "ocr", "lora_int_id": 1, "probability": 1.0},
        {"request": "a.jsonl:7", "lora_name": "ocr", "lora_int_id": 1, "probability": 0.5},
    ],
}


def test_what_is_written(tmp_path):
    path = tmp_path / "new" / "routes.json"
    write_manifest(path, iter(ROUTES), ADAPTERS)
    assert json.loads(path.read_text(encoding="utf-8")) == GOOD
    assert list(path.parent.iterdir()) == [path]


def test_no_requests_are_fine(tmp_path):
    write_manifest(tmp_path / "m.json", [], ADAPTERS)
    assert json.loads((tmp_path / "m.json").read_text())["requests"] == []


def test_a_relative_folder_is_written_as_an_absolute_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_manifest(Path("m.json"), [], {"ocr": Path("runs/ocr")})
    assert json.loads(Path("m.json").read_text())["adapters"][0]["lora_path"] == str(tmp_path / "runs/ocr")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.json"
    write_manifest(path, ROUTES, ADAPTERS)
    before = path.read_bytes()

    def full(self, *_, **__):
        self.touch()
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        write_manifest(path, [], ADAPTERS)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a=b", "a,b", "a b"])
def test_names_that_vllm_would_split(tmp_path, name):
    with pytest.raises(UserError, match=r"m\.json: adapters\.1\.lora_name='a.b': .* no space"):
        write_manifest(tmp_path / "m.json", [], {"ocr": Path("/a"), name: Path("/a")})
    assert not list(tmp_path.iterdir())
