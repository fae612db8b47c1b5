"""The same conversations in every form that is streamed."""

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from tests.records import chat

FORMS = ("jsonl", "parquet", "saved", "mixture")
RECORDS = 150  # of 200 bytes or so


def records(count: int = RECORDS, name: str = "n") -> Iterator[dict]:
    """Told apart by their answers; their lengths vary, every third has the image a.png."""
    for number in range(count):
        question = ("<image>" if number % 3 == 0 else "") + "Is this a digit? " * (1 + number % 7)
        yield {**chat(question, f"{name} {number}"), "images": ["a.png"] if number % 3 == 0 else []}


def data_of(form: str, folder: Path) -> str | list[dict]:
    """These records in `folder`, in one of the FORMS, as data.train names them. A mixture has 40 others too."""
    rows = list(records())
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", row_group_size=11)
        return str(folder / "train.parquet")
    if form == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(folder / "saved", num_shards=3)
        return str(folder / "saved")
    if form == "mixture":  # of a file, and a folder of shards as a dataset of the hub has them
        other = _lines(folder / "other.jsonl", list(records(40, "m")))
        (folder / "hub").mkdir()
        for shard in range(3):
            name = folder / "hub" / f"train-{shard:05}-of-00003.parquet"
            pq.write_table(pa.Table.from_pylist(rows[shard::3]), name, row_group_size=7)
        return [{"path": str(folder / "hub"), "weight": 2}, {"path": other, "weight": 1}]
    return _lines(folder / "train.jsonl", rows)


def _lines(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)
