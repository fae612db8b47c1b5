"""Sources that somebody else has made: archives, compressed files, folders, caches; each is one line, soon."""

import gzip
import json
import os
import pickle
import tarfile

import pytest

from ds_moe.data.sources.archive import MAX_NAME
from ds_moe.data.sources.tar import MAX_IMAGE
from tests.data.sources import hub_cache, png, tar, zst

from .conftest import line, record
from .limits import Payload, refusal


def header(name: str, kind: bytes = b"0", size: bytes = b"") -> bytes:
    """A header of tar with a right checksum; `size` as its field has it."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[156:157] = kind
    if size:
        block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def archive(record: object = None, **members: bytes) -> bytes:
    content = {"a.json": json.dumps(record).encode()} if record is not None else {}
    return tar(content | {name.replace("_", "."): one for name, one in members.items()})


ASKS = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]}
# name -> (file name, content or what makes it, what the error says)
FILES = {
    "a tar of nothing": ("a.tar", b"", "is cut off: it ends at byte 0 without an end mark"),
    "a pickle named .tar": ("a.tar", pickle.dumps([1]) * 100, "is no tar file, or damaged, at byte 0"),
    "a gzip named .tar": ("a.tar", gzip.compress(os.urandom(2000)), "is no tar file, or damaged, at byte 0"),
    "a tar cut off within a member": ("a.tar", archive(record(), a_png=png())[:1700], "is cut off"),
    "two tars in one": ("a.tar", archive(record()) + archive(record()), "goes on behind its end mark"),
    "a negative size": ("a.tar", header("a.json", size=b"\xff" * 12) + bytes(1024), "is damaged: no size at byte 0"),
    "a size beyond the file": (
        "a.tar",
        header("a.json", size=b"77777777777") + bytes(1024),
        "is cut off within 'a.json'",
    ),
    "a size of 2^80": (
        "a.tar",
        header("a.json", size=b"\x80" + b"\x7f" * 11) + bytes(1024),
        "is cut off within 'a.json'",
    ),
    "a name of 8 GiB": (
        "a.tar",
        header("././@LongLink", b"L", b"77777777777") + bytes(1024),
        "has a header of 8589934591 bytes",
    ),
    "an extended header that lies": (
        "a.tar",
        header("x", b"x", b"00000000020") + b"9999 path=a\n".ljust(512, b"\0") + bytes(1024),
        "a broken header at byte 0",
    ),
    "an extended size that is no number": (
        "a.tar",
        header("x", b"x", b"00000000013") + b"11 size=-1\n".ljust(512, b"\0") + bytes(1024),
        "no size at byte 0",
    ),
    "a link out of the archive": ("a.tar", header("a.json", b"2") + bytes(1024), "holds a symbolic link, 'a.json'"),
    "a device in an archive": ("a.tar", header("a.json", b"3") + bytes(1024), "holds a device, 'a.json'"),
    "a sparse file of 8 GiB": ("a.tar", header("a.json", b"S") + bytes(1024), "holds a member of the type b'S'"),
    "a record in two places": (
        "a.tar",
        tar({"a.json": line(), "b.json": line(), "a.png": png()}),
        "do not stand together",
    ),
    "an image without a record": ("a.tar", archive(a_png=png()), "a.tar:a.png: no member 'a.json' with the messages"),
    "a pickle as a member": ("a.tar", archive(record(), a_pkl=b"x"), "a.tar:a.json: the member 'a.pkl' is not read"),
    "an image out of the archive": (
        "a.tar",
        archive({**ASKS, "images": ["../secret.png"]}),
        "a.tar:a.json: missing image '../secret.png'",
    ),
    "an image beside the archive": ("a.tar", archive({**ASKS, "images": ["good.png"]}), "missing image 'good.png'"),
    "an image that is none": ("a.tar", archive(ASKS, a_png=b"GIF89"), "a.tar:a.json: "),
    "an image of 128 MB of zeros": (
        "a.tar",
        lambda path, canary: sparse(path, MAX_IMAGE + 512),
        f"a.tar:a.json: the member 'a.png' has {MAX_IMAGE + 512} bytes, at most {MAX_IMAGE} are read",
    ),
    "a gzip cut off": ("a.jsonl.gz", gzip.compress(line() * 100)[:-9], "a.jsonl.gz cannot be unpacked: "),
    "a gzip of something else": ("a.jsonl.gz", line(), "a.jsonl.gz cannot be unpacked: "),
    "a zstd cut off": ("a.jsonl.zst", zst(line() * 100)[:-9], "a.jsonl.zst cannot be unpacked: "),
    "a zstd of something else": ("a.jsonl.zst", line(), "a.jsonl.zst cannot be unpacked: "),
    "a bomb": ("a.jsonl.gz", lambda path, canary: bomb(path), "unpacks to more than"),
    "a folder with a pipe": (
        "s",
        lambda path, canary: (path.mkdir(), os.mkfifo(path / "a.jsonl")),
        "a.jsonl is no regular file",
    ),
    "a folder of one that links to itself": (
        "s",
        lambda path, canary: (path.mkdir(), (path / "s").symlink_to(path)),
        "a link to a folder, which is not followed",
    ),
    "a saved dataset of a pickle": (
        "s",
        lambda path, canary: (
            path.mkdir(),
            (path / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}'),
            (path / "a.arrow").write_bytes(pickle.dumps(Payload(canary))),
        ),
        "a.arrow is not an Arrow file of `save_to_disk` that can be read",
    ),
    "a saved dataset that describes itself for ever": (
        "s",
        lambda path, canary: (path.mkdir(), (path / "state.json").write_text("[" * 200_000)),
        "state.json is not as `save_to_disk` writes it",
    ),
}


def sparse(path, size: int) -> None:
    """An archive with a record and an image of so many bytes, which takes no room."""
    field = b"%011o" % size
    path.write_bytes(archive(ASKS)[:1024] + header("a.png", size=field))
    os.truncate(path, 1536 + size + 1024)


def bomb(path) -> None:
    """100 MB of spaces in 400 kB."""
    with gzip.open(path, "wb", compresslevel=1) as packed:
        for _ in range(100):
            packed.write(b" " * 2**20)


@pytest.mark.parametrize("name", FILES)
def test_a_source_that_is_no_data_is_refused(stream, folder, canary, name):
    file, content, says = FILES[name]
    path = folder / file
    path.write_bytes(content) if isinstance(content, bytes) else content(path, canary)
    refusal(lambda: stream(path), path, says)


def test_a_header_of_the_largest_size_passes(stream, folder):
    """Positive control, with images at any depth and a long name."""
    assert MAX_NAME > 5000
    (folder / "a.tar").write_bytes(
        tar({f"{'x/' * 2000}a.json": json.dumps(ASKS).encode(), f"{'x/' * 2000}a.png": png()})
    )
    assert len(list(zip(range(1), stream(folder / "a.tar"), strict=False))) == 1


def test_a_cache_of_the_hub_that_leads_out(tmp_path, folder, stream, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = hub_cache(tmp_path, {"train.jsonl": json.dumps({**ASKS, "images": ["out.png"]}).encode()})
    (next(cache.glob("*/snapshots/*")) / "out.png").symlink_to(tmp_path / "secret.png")
    refusal(lambda: stream("hub:some/chats"), "hub:some/chats@0123456/train.jsonl:1: ", "out.png' leaves the data root")


def test_an_archive_that_changes_behind_its_index(stream, folder):
    file = folder / "a.tar"
    file.write_bytes(tar({f"{name}.json": line() for name in "abc"}))
    made = stream(file)
    file.write_bytes(bytes(5000))
    refusal(lambda: next(iter(made)), f"{file}: ", "has changed since the run opened it")
