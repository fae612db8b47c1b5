"""The same conversations in every form that a source may have, and a cache of the hub as its client leaves it."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def records(count: int, name: str = "n") -> list[dict]:
    """Told apart by their answers; their lengths vary."""
    return [
        {
            "messages": [
                {"role": "user", "content": "Is this a digit? " * (1 + number % 7)},
                {"role": "assistant", "content": f"{name} {number}"},
            ]
        }
        for number in range(count)
    ]


def lines(some: list[dict]) -> bytes:
    return "".join(f"{json.dumps(one)}\n" for one in some).encode()


def png(colour: tuple[int, int, int] = (250, 10, 10), size: tuple[int, int] = (16, 16)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return stream.getvalue()


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return sink.getvalue().to_pybytes()


def jsonl(folder: Path, some: list[dict]) -> str:
    (folder / "some.jsonl").write_bytes(lines(some))
    return str(folder / "some.jsonl")


def packed_gz(folder: Path, some: list[dict]) -> str:
    half = len(some) // 2  # two members of gzip, as `cat a.gz b.gz` makes them
    (folder / "some.jsonl.gz").write_bytes(gzip.compress(lines(some[:half])) + gzip.compress(lines(some[half:])))
    return str(folder / "some.jsonl.gz")


def packed_zst(folder: Path, some: list[dict]) -> str:
    half = len(some) // 2  # two frames
    (folder / "some.jsonl.zst").write_bytes(zst(lines(some[:half])) + zst(lines(some[half:])))
    return str(folder / "some.jsonl.zst")


def some_jsonl(folder: Path, some: list[dict]) -> str:
    third = -(-len(some) // 3)
    for number in range(3):
        (folder / f"part-{number}.jsonl").write_bytes(lines(some[number * third : (number + 1) * third]))
    return str(folder / "part-*.jsonl")


def parquet_folder(folder: Path, some: list[dict]) -> str:
    half = len(some) // 2
    (folder / "shards").mkdir()
    for number, part in enumerate((some[:half], some[half:])):
        pq.write_table(
            pa.Table.from_pylist(part), folder / f"shards/train-{number:05}-of-00002.parquet", row_group_size=7
        )
    return str(folder / "shards")


def saved(folder: Path, some: list[dict]) -> str:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(some).save_to_disk(folder / "saved", num_shards=2)
    return str(folder / "saved")


def webdataset(folder: Path, some: list[dict]) -> str:
    half = len(some) // 2
    for shard, part in enumerate((some[:half], some[half:])):
        members = {f"{shard}{number:06}.json": json.dumps(one).encode() for number, one in enumerate(part)}
        (folder / f"{shard:06}.tar").write_bytes(tar(members))
    return str(folder / "{000000..000001}.tar")


def hub_cache(
    folder: Path, files: dict[str, bytes], name: str = "some/chats", commit: str = COMMIT, ref: str = "main"
) -> Path:
    """A cache of the hub that holds a dataset at a commit; its folder."""
    cache = folder / "hub_cache"
    own = cache / f"datasets--{name.replace('/', '--')}"
    (own / "refs").mkdir(parents=True, exist_ok=True)
    (own / "blobs").mkdir(exist_ok=True)
    (own / f"refs/{ref}").write_text(commit)
    for path, content in files.items():
        blob = own / f"blobs/{commit[:4]}{abs(hash((path, content))):x}"
        blob.write_bytes(content)
        link = own / f"snapshots/{commit}/{path}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return cache


FORMS = {
    "jsonl": jsonl,
    "gz": packed_gz,
    "zst": packed_zst,
    "a pattern": some_jsonl,
    "parquet": parquet_folder,
    "save_to_disk": saved,
    "tar": webdataset,
}
