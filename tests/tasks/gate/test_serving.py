"""The routing manifest: what is written, what comes back, and everything that is refused."""

import copy
import json
import math
from pathlib import Path

import pytest

from ds_moe.errors import UserError
from ds_moe.tasks.gate.serving import Manifest, Route, read_manifest, write_manifest

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


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "new" / "routes.json"
    write_manifest(path, iter(ROUTES), ADAPTERS)
    assert json.loads(path.read_text(encoding="utf-8")) == GOOD
    assert read_manifest(path) == Manifest(ROUTES, ADAPTERS)
    assert list(path.parent.iterdir()) == [path]

    again = tmp_path / "again.json"
    manifest = read_manifest(path)
    write_manifest(again, manifest.routes, manifest.adapters)
    assert again.read_bytes() == path.read_bytes()


def test_no_requests_are_fine(tmp_path):
    write_manifest(tmp_path / "m.json", [], ADAPTERS)
    assert read_manifest(tmp_path / "m.json").routes == ()


def test_a_relative_folder_is_written_as_an_absolute_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_manifest(Path("m.json"), [], {"ocr": Path("runs/ocr")})
    assert read_manifest(Path("m.json")).adapters == {"ocr": tmp_path / "runs/ocr"}


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.json"
    write_manifest(path, ROUTES, ADAPTERS)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"requests\.0\.lora_name='chat' is none of the adapters ocr, bildschirm-ü"):
        write_manifest(path, [Route("a:1", "chat", 0.5)], ADAPTERS)

    def full(self, *_, **__):
        self.touch()
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        write_manifest(path, [], ADAPTERS)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("probability", [-0.1, 1.01, math.nan, math.inf])
def test_only_probabilities_are_written(tmp_path, probability):
    with pytest.raises(UserError, match=r"requests\.0\.probability"):
        write_manifest(tmp_path / "m.json", [Route("a:1", "ocr", probability)], ADAPTERS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "a=b", "a,b", "a b"])
def test_names_that_vllm_would_split(tmp_path, name):
    with pytest.raises(UserError, match=r"adapters\.0\.lora_name"):
        write_manifest(tmp_path / "m.json", [], {name: Path("/a")})


GONE = object()
REFUSED = [
    (("format",), 2, "format=2, this version reads 1"),
    (("format",), GONE, "the manifest has no format"),
    (("format",), True, "format=True: expected a whole number"),
    (("adapters",), [], "adapters is empty"),
    (("adapters",), {}, r"adapters=\{\}: expected a list"),
    (("requests",), GONE, "the manifest has no requests"),
    (("extra",), 1, "extra is no key of a manifest"),
    (("adapters", 1), "ocr", r"adapters\.1 is a str: expected an object"),
    (("adapters", 1, "lora_name"), "ocr", r"adapters\.1\.lora_name='ocr' is adapters\.0 already"),
    (("adapters", 1, "lora_name"), "a=b", r"adapters\.1\.lora_name='a=b'"),
    (("adapters", 0, "lora_int_id"), 0, r"adapters\.0\.lora_int_id=0: .* set it to 1"),
    (("adapters", 0, "lora_int_id"), "1", r"adapters\.0\.lora_int_id='1': expected a whole number"),
    (("adapters", 1, "lora_path"), "", r"adapters\.1\.lora_path is empty"),
    (("adapters", 1, "lora_path"), GONE, r"adapters\.1 has no lora_path"),
    (("adapters", 1, "rank"), 8, r"adapters\.1\.rank is no key"),
    (("requests", 1, "lora_name"), "chat", r"requests\.1\.lora_name='chat' is none of the adapters ocr, bild"),
    (("requests", 1, "lora_int_id"), 2, r"requests\.1\.lora_int_id=2, but the id of 'ocr' is 1"),
    (("requests", 2, "probability"), 1.5, r"requests\.2\.probability=1\.5: expected 0 to 1"),
    (("requests", 2, "probability"), math.nan, r"requests\.2\.probability=nan"),
    (("requests", 2, "probability"), "high", r"requests\.2\.probability='high': expected a number"),
    (("requests", 0, "request"), GONE, r"requests\.0 has no request"),
    (("requests", 0, "request"), 7, r"requests\.0\.request=7: expected a text"),
]


@pytest.mark.parametrize(("keys", "value", "message"), REFUSED)
def test_refused_manifests_name_file_and_key(tmp_path, keys, value, message):
    values = copy.deepcopy(GOOD)
    place = values
    for key in keys[:-1]:
        place = place[key]
    if value is GONE:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    path = tmp_path / "m.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"^{path}: {message}") as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value)


def test_a_probability_may_be_a_whole_number(tmp_path):
    values = copy.deepcopy(GOOD)
    values["requests"][0]["probability"] = 1
    (tmp_path / "m.json").write_text(json.dumps(values))
    assert read_manifest(tmp_path / "m.json").routes[0].probability == 1.0


def test_what_is_no_manifest(tmp_path):
    path = tmp_path / "m.json"
    with pytest.raises(UserError, match="cannot read the routing manifest"):
        read_manifest(path)
    path.write_text('{"format": 1,\n oops')
    with pytest.raises(UserError, match=r"m\.json:2: not valid JSON"):
        read_manifest(path)
    path.write_bytes(b'{"format": "\xff"}')
    with pytest.raises(UserError, match="cannot read the routing manifest"):
        read_manifest(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="the manifest is a list: expected an object with format, adapters, requests"):
        read_manifest(path)
