"""Sources of any form give the same records, and what is wrong with a path is one line."""

import errno
import json
import os
from pathlib import Path

import datasets
import pytest

from ds_moe.config.sections import DataConfig
from ds_moe.data.chat import parse_record
from ds_moe.data.records import open_records, read_records
from ds_moe.data.sources.files import braces
from ds_moe.data.sources.tar import TarRecords
from ds_moe.data.sources.unpack import MOST_TIMES
from ds_moe.errors import UserError
from tests.data.sources import FORMS, hub_cache, lines, png, records, saved, tar, zst

MESSAGES = [{"role": "user", "content": "<image>Which colour?"}, {"role": "assistant", "content": "red"}]


@pytest.fixture
def read(tmp_path):
    """read(data.train, data={...}) -> records, with a cache below tmp_path."""

    def opened(train, **data):
        config = DataConfig(train=train, **data)
        return open_records(config.train, "train", config, tmp_path / "cache")

    return opened


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(files, ...) puts a dataset into the only cache that there is, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return lambda files, **options: hub_cache(tmp_path, files, **options)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_samples(form, folder, read):
    some = records(11)
    found = read(FORMS[form](folder, some))
    samples = [found.sample(index) for index in range(len(found))]
    expected = [parse_record(one, samples[number].where, folder) for number, one in enumerate(some)]
    assert samples == expected and [found.where(index) for index in range(11)] == [one.where for one in samples]
    assert len(found.sha256) == 64 and len({one.where for one in samples}) == 11 and found.sources == ()
    assert all(one.where.partition(":")[0].startswith(str(folder)) for one in samples)


def test_places_name_the_shard_and_the_row_or_member(folder, read):
    wheres = {form: read(FORMS[form](folder, records(4))).where(3) for form in FORMS}
    assert {form: str(Path(where).relative_to(folder)) for form, where in wheres.items()} == {
        "jsonl": "some.jsonl:4",
        "gz": "some.jsonl.gz:4",
        "zst": "some.jsonl.zst:4",
        "a pattern": "part-1.jsonl:2",
        "parquet": "shards/train-00001-of-00002.parquet:2",
        "save_to_disk": "saved/data-00001-of-00002.arrow:2",
        "tar": "000001.tar:1000001.json",
    }


def test_unpacked_once_and_again_where_the_file_has_changed(folder, read, tmp_path, capsys):
    file = folder / "some.jsonl.zst"
    file.write_bytes(zst(lines(records(3))))
    first = read(str(file))
    assert "some.jsonl.zst is unpacked into" in capsys.readouterr().out
    assert read(str(file)).sha256 == first.sha256 and not capsys.readouterr().out
    (folder / "some.jsonl").write_bytes(lines(records(3)))
    assert read(str(folder / "some.jsonl")).sha256 == first.sha256  # of the lines, however they are packed
    file.write_bytes(zst(lines(records(4))))
    assert len(read(str(file))) == 4
    assert {one.suffix for one in (tmp_path / "cache").iterdir()} == {".jsonl", ".lock"}


def test_columns_take_the_place_of_keys(folder, read):
    turns = [{"from": "human", "value": "<image>Which colour?"}, {"from": "gpt", "value": "red"}]
    (folder / "llava.jsonl").write_bytes(lines([{"chat": turns, "screen": "a.png", "messages": "not these", "id": 3}]))
    [sample] = [
        read({"path": str(folder / "llava.jsonl"), "columns": {"messages": "chat", "images": "screen"}}).sample(0)
    ]
    assert sample.answer == "red" and [image.name for image in sample.images] == ["a.png"]
    with pytest.raises(UserError, match=r"columns\.images names 'scren', which no record of .* has \(it has chat, id,"):
        read(
            {"path": str(folder / "llava.jsonl"), "columns": {"messages": "chat", "images": "scren"}},
            on_bad_record="skip",
        )


def test_a_root_of_its_own_and_a_name_for_records_without_a_kind(folder, read, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.jsonl").write_bytes(lines([{"messages": MESSAGES, "images": ["a.png"], "kind": "own"}]))
    (folder / "a.jsonl").write_bytes(lines(records(2)))
    given = [str(folder / "a.jsonl"), {"path": str(tmp_path / "elsewhere/b.jsonl"), "root": str(folder)}]
    found = read(given)
    assert [found.sample(index).kind for index in range(3)] == ["a", "a", "own"] and found.kinds == ("a", "own")
    assert [(one.name, one.records) for one in found.sources] == [("a", 2), ("b", 1)]
    assert read({"path": str(folder / "a.jsonl"), "name": "named"}).kinds == ("named",)
    assert read(str(folder / "a.jsonl")).kinds == ()


def test_bad_records_of_all_sources_are_listed_by_source_and_row(folder, read):
    (folder / "a.jsonl").write_bytes(lines(records(1)) + b"{}\n")
    (folder / "b.tar").write_bytes(tar({"x.json": b"{", "y.json": json.dumps(records(1)[0]).encode()}))
    given = [str(folder / "a.jsonl"), str(folder / "b.tar")]
    assert [bad.where for bad in read(given, on_bad_record="skip").bad] == [
        f"{folder}/a.jsonl:2",
        f"{folder}/b.tar:x.json",
    ]
    with pytest.raises(UserError, match=r"a\.jsonl:2: .* \[and 1 more bad records\]"):
        read(given)


def test_saved_splits(folder, read):
    some = datasets.Dataset.from_list(records(3))
    datasets.DatasetDict({"train": some, "test": some.select([1])}).save_to_disk(folder / "dict")
    assert len(read({"path": str(folder / "dict"), "split": "test"})) == 1
    with pytest.raises(UserError, match="several splits .set split to one of train, test"):
        read(str(folder / "dict"))
    with pytest.raises(UserError, match="no split 'dev'"):
        read({"path": str(folder / "dict"), "split": "dev"})


def test_braces_are_a_shells():
    assert braces("a{0..2}{x,y}") == ["a0x", "a0y", "a1x", "a1y", "a2x", "a2y"]
    assert braces("{08..11}.tar") == ["08.tar", "09.tar", "10.tar", "11.tar"] and braces("{2..0}") == ["2", "1", "0"]
    assert braces("plain{x}") == ["plain{x}"]
    with pytest.raises(UserError, match="names more than 100,000 files"):
        braces("{0..999999999}")


# name -> (files, data.train, what the error says)
PATHS = {
    "an empty folder": ({"sub/read.me": b""}, "sub", "a folder without data files"),
    "two forms": ({"s/a.jsonl": lines(records(1)), "s/b.parquet": b""}, "s", "holds s/a.jsonl and s/b.parquet"),
    "a shard missing": (
        {"s/t-00001-of-00003.jsonl": b""},
        "s",
        "lacks 2 of 3 shards, the first s/t-00000-of-00003.jsonl",
    ),
    "a shard missing of those with a hash": (
        {"s/train-00001-of-00002-6f3344faa23e9b0a.parquet": b""},
        "s",
        "lacks 1 of 2 shards, the first s/train-00000-of-00002.parquet",
    ),
    "a shard missing behind a dot": ({"s/train.00001-of-00002.jsonl": b""}, "s", "the first s/train.00000-of-00002"),
    "a shard missing behind an underscore": ({"s/part_00001-of-00002.jsonl": b""}, "s", "lacks 1 of 2 shards"),
    "a pattern without a match": ({}, "x-*.jsonl", "x-*.jsonl matches no file"),
    "a brace without a match": ({"0.tar": tar({})}, "{0..1}.tar", "1.tar, of {0..1}.tar matches no file"),
    "a pattern that matches others": ({"a.jsonl": b"", "a.md": b""}, "a.*", "a.md is neither .jsonl nor"),
    "packed tar": ({"a.tar.gz": b""}, "a.tar.gz", "is a compressed .tar, whose records cannot be read one by one"),
    "a split of a file": ({"a.jsonl": b""}, {"path": "a.jsonl", "split": "x"}, "split 'x' would not be used"),
    "a split of a folder": ({"s/a.jsonl": b""}, {"path": "s", "split": "x"}, "s is no saved DatasetDict"),
    "a root of a tar": ({"a.tar": tar({})}, {"path": "a.tar", "root": "."}, "root '.' would not be used"),
    "state.json that leads out": (
        {"s/state.json": b'{"_data_files": [{"filename": "../a.arrow"}]}', "a.arrow": b""},
        "s",
        "no Arrow file beside it",
    ),
    "state.json of a file that has gone": (
        {"s/state.json": b'{"_data_files": [{"filename": "a.arrow"}]}'},
        "s",
        "s/a.arrow does not exist",
    ),
    "broken state.json": ({"s/state.json": b"{"}, "s", "s/state.json is not as `save_to_disk` writes it"),
    "splits that lead out": ({"s/dataset_dict.json": b'{"splits": ["../x"]}'}, "s", "names splits that are no folders"),
    "an Arrow file of zeros": (
        {"s/state.json": b'{"_data_files": [{"filename": "a.arrow"}]}', "s/a.arrow": bytes(512)},
        "s",
        "s/a.arrow is not an Arrow file of `save_to_disk` that can be read",
    ),
    "a root that is no folder": (
        {"a.jsonl": b""},
        {"path": "a.jsonl", "root": "x"},
        "root of a.jsonl: x is not a folder",
    ),
    "more files than are read": ({f"{name}.jsonl": b"" for name in "abcd"}, "*.jsonl", "names more than 3 files"),
    "no dataset of the hub": ({}, "hub:../x", "names no dataset of the hub"),
}


@pytest.mark.parametrize("name", PATHS)
def test_what_is_wrong_with_a_path_is_one_line(name, tmp_path, monkeypatch, read):
    files, given, says = PATHS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ds_moe.data.sources.find.MOST_FILES", 3)
    for file, content in files.items():
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(given)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_below_that_is_a_link_or_cannot_be_read_is_refused(folder, read, monkeypatch):
    (folder / "all/b").mkdir(parents=True)
    (folder / "all/a.jsonl").write_bytes(lines(records(2)))
    (folder / "all/b/b.jsonl").write_bytes(lines(records(2)))
    (folder / "all/.hidden").symlink_to(folder)
    assert len(read(str(folder / "all"))) == 4
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", lambda path, real=os.scandir: denied(path) if path.endswith("b") else real(path))
        with pytest.raises(UserError, match=r"all/b cannot be read \(Permission denied\)"):
            read(str(folder / "all"))
    (folder / "all/link").symlink_to(folder / "all/b")
    with pytest.raises(UserError, match="all/link is a link to a folder, which is not followed"):
        read(str(folder / "all"))


def denied(path):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@pytest.mark.parametrize("form", ["jsonl", "gz", "tar"])
def test_a_file_that_changes_behind_its_index_ends_the_run(form, folder, read):
    found = read(FORMS[form](folder, records(4)))
    assert found.sample(3).answer == "n 3"
    for file in [*folder.parent.rglob("unpacked_*.jsonl")] or folder.iterdir():
        content = file.read_bytes()
        file.write_bytes(content.replace(b"n 0", b"m 0"))
        os.utime(file, ns=(0, 1))
    with pytest.raises(UserError, match="has changed since the run opened it"):
        found.sample(0)


# --- archives


def test_images_of_an_archive_are_members(folder, read):
    named = {"messages": MESSAGES, "images": ["1.jpg"]}
    parts = [{"type": "image", "image": "x/2.b.png"}, {"type": "text", "text": "Which colour?"}]
    typed = {"messages": [{"role": "user", "content": parts}, MESSAGES[1]]}
    members = {
        "x/1.jpg": png(),
        "x/1.json": json.dumps(named).encode(),
        "x/1.txt": b"not read",
        "x/2.a.png": png((0, 0, 9)),
        "x/2.b.png": png((0, 9, 0)),
        "x/2.json": json.dumps(typed).encode(),
        "x/3.json": json.dumps({"messages": MESSAGES}).encode(),
        "x/3.png": png((9, 0, 0)),
        "x/4.json": json.dumps(records(1)[0]).encode(),
    }
    (folder / "a.tar").write_bytes(tar(members))
    found = read(str(folder / "a.tar"))
    images = [[(one.name, one.data) for one in found.sample(index).images] for index in range(4)]
    assert images == [
        [("x/1.jpg", png())],
        [("x/2.b.png", png((0, 9, 0)))],
        [("x/3.png", png((9, 0, 0)))],
        [],
    ]
    assert found.where(1) == f"{folder}/a.tar:x/2.json" and isinstance(found, TarRecords)


def test_a_column_of_an_archive_is_an_ending(folder, read):
    members = {"1.a.png": png(), "1.b.png": png((1, 1, 1)), "1.json": json.dumps({"messages": MESSAGES}).encode()}
    (folder / "a.tar").write_bytes(tar(members | {"2.json": json.dumps(records(1)[0]).encode()}))
    [image] = read({"path": str(folder / "a.tar"), "columns": {"images": "b.png"}}).sample(0).images
    assert image.data == png((1, 1, 1))
    [bad] = read([str(folder / "a.tar"), "digits"], on_bad_record="skip").bad
    assert "1 <image> placeholders for 2 images" in bad.reason


# --- the hub


CARD = b"""---
configs:
- config_name: small
  data_files:
  - split: train
    path: s/*.jsonl
- config_name: large
  data_files: l/*.jsonl
---
"""


def test_a_dataset_of_the_hub_is_read_from_the_cache_at_its_commit(hub, read):
    some = {
        "data/train-00000-of-00001.jsonl": lines(records(3)),
        "data/test-00000-of-00001.jsonl": lines(records(2)),
        "README.md": b"# x",
    }
    hub(some)
    found = read("hub:some/chats")
    assert len(found) == 3 and found.where(2) == "hub:some/chats@0123456/data/train-00000-of-00001.jsonl:3"
    assert len(read({"path": "hub:some/chats", "split": "test"})) == 2
    hub({"data/train.jsonl": lines(records(5))}, commit="f" * 40, ref="v2")
    assert len(read({"path": "hub:some/chats", "revision": "v2"})) == 5
    assert len(read({"path": "hub:some/chats", "revision": "0123456789abcdef0123456789abcdef01234567"})) == 3


def test_subsets_and_images_of_a_dataset_of_the_hub(hub, read):
    record = {"messages": MESSAGES, "images": ["images/1.png"]}
    hub(
        {
            "README.md": CARD,
            "s/1.jsonl": lines(records(2)),
            "l/1.jsonl": lines([record]),
            "images/1.png": png((1, 1, 1)),
            "l/images/1.png": png(),
        }
    )
    assert len(read({"path": "hub:some/chats", "subset": "small"})) == 2
    [image] = read({"path": "hub:some/chats", "subset": "large"}).sample(0).images
    assert image.path is not None and image.path.read_bytes() == png() and image.name == "images/1.png"
    [image] = read({"path": "hub:some/chats", "subset": "large", "root": "."}).sample(0).images
    assert image.path is not None and image.path.read_bytes() == png((1, 1, 1))
    with pytest.raises(UserError, match="root '../x' of hub:some/chats is no folder within it"):
        read({"path": "hub:some/chats", "subset": "large", "root": "../x"})
    with pytest.raises(UserError, match="hub:some/chats: .*set subset"):
        read("hub:some/chats")


# name -> (files in the cache, data.train, what the error says)
HUB = {
    "not in the cache": (
        {},
        "hub:other/name",
        "hub:other/name is not in the cache, and the hub is out of reach (where there",
    ),
    "no such revision": (
        {},
        {"path": "hub:some/chats", "revision": "v9"},
        "hub:some/chats at revision v9 is not in the cache",
    ),
    "another form": ({"train.csv": b"a,b\n"}, "hub:some/chats", "train.csv is neither .jsonl nor"),
    "no such split": (
        {"train.jsonl": b""},
        {"path": "hub:some/chats", "split": "dev"},
        "has no split 'dev' (set split to one of: train)",
    ),
    "a shard missing": ({"train-00001-of-00002.jsonl": lines(records(1))}, "hub:some/chats", "lacks 1 of 2 shards"),
    "a card that leads out": (
        {"README.md": b"---\nconfigs:\n- config_name: x\n  data_files: ../../../../secret.jsonl\n---\n"},
        "hub:some/chats",
        "secret.jsonl', outside of it",
    ),
    "a card that leads out from the root": (
        {"README.md": b"---\nconfigs:\n- config_name: x\n  data_files: /etc/hostname\n---\n"},
        "hub:some/chats",
        "Unable to find '/etc/hostname' with any supported extension",
    ),
    "a card that is no YAML": (
        {"README.md": b"---\n: [\n---\n", "train.jsonl": b""},
        "hub:some/chats",
        "hub:some/chats: while parsing",
    ),
    "images that lead out": (
        {"train.jsonl": lines([{"messages": MESSAGES, "images": ["../../../refs/main"]}])},
        "hub:some/chats",
        "leaves the dataset",
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_what_is_wrong_with_a_dataset_of_the_hub_is_one_line(name, hub, read, tmp_path):
    files, given, says = HUB[name]
    hub({"x": b"", **files})
    (tmp_path / "secret.jsonl").write_bytes(lines(records(1)))
    with pytest.raises(UserError) as caught:
        read(given)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_bomb_is_not_unpacked(folder, read, monkeypatch, tmp_path):
    monkeypatch.setattr("ds_moe.data.sources.unpack.ALWAYS", 2**16)
    (folder / "bomb.jsonl.zst").write_bytes(zst(b" " * 2**20))
    with pytest.raises(
        UserError, match=f"bomb.jsonl.zst unpacks to more than 65,536 bytes, {MOST_TIMES} times its size"
    ):
        read(str(folder / "bomb.jsonl.zst"))
    assert not [one for one in (tmp_path / "cache").iterdir() if one.suffix != ".lock"]


def test_read_records_takes_any_path(folder, tmp_path):
    path = saved(folder, records(2))
    assert len(read_records(path, DataConfig(train=path), tmp_path)) == 2
