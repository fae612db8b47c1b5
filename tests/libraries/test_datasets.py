"""What datasets does that a reader of its manual would not expect. A test that fails here means that a guard may go.

`docs/libraries.md` lists them all.
"""

import io
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tests.data.sources import tar


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def test_a_list_behind_ten_megabytes_of_strings_is_read_as_its_json(tmp_path):
    """Guard: `JsonlRecords` of data/sources/jsonl.py reads JSON lines by itself."""
    lines = [json.dumps({"content": "x" * 2**20})] * 11 + [json.dumps({"content": [{"type": "text"}]})]
    (tmp_path / "file.jsonl").write_text("\n".join(lines))
    rows = datasets.Dataset.from_json(str(tmp_path / "file.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert isinstance(rows[-1]["content"], str) and json.loads(rows[-1]["content"]) == [{"type": "text"}]


def test_fields_of_other_records_are_there_and_none(tmp_path):
    """Guard: `parse_record` and `_as_role_and_content` of data/chat.py leave them out."""
    parts = [{"type": "text", "text": "a"}, {"type": "image", "image": "b.png"}]
    table = pyarrow.Table.from_pylist([{"content": parts, "system": None}, {"content": parts, "system": "x"}])
    pyarrow.parquet.write_table(table, tmp_path / "file.parquet")
    rows = datasets.Dataset.from_parquet(str(tmp_path / "file.parquet"), cache_dir=str(tmp_path / "cache"))
    assert rows[0] == {"system": None, "content": [{**parts[0], "image": None}, {**parts[1], "text": None}]}


def test_an_image_column_is_decoded_as_it_is_read_unless_arrow_is_asked_for(tmp_path):
    """Guard: `ArrowRecords` of data/sources/arrow.py asks for Arrow: data/images.py decodes, within its limits."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}]}, features=features)
    rows.to_parquet(tmp_path / "file.parquet")
    rows = datasets.Dataset.from_parquet(str(tmp_path / "file.parquet"), cache_dir=str(tmp_path / "cache"))
    assert isinstance(rows[0]["image"], Image.Image)
    assert rows.with_format("arrow")[0:1].to_pylist()[0]["image"]["bytes"] == file.getvalue()


def test_rows_are_copied_into_the_cache(tmp_path):
    """Guard: `open_records` of data/records.py keeps the copy in the run's output folder."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"a": 1}]), tmp_path / "file.parquet")
    datasets.Dataset.from_parquet(str(tmp_path / "file.parquet"), cache_dir=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").rglob("*.arrow"))


def test_of_a_shard_only_what_the_first_five_samples_have_is_read(tmp_path):
    """Guard: data/sources/tar.py reads archives by itself."""
    members = {}
    for number in range(7):
        late = {"tools": "search"} if number >= 5 else {}
        members[f"{number}.json"] = json.dumps({"text": "a", **late}).encode()
        members |= {f"{number}.txt": b"late"} if number >= 5 else {}
    (tmp_path / "0.tar").write_bytes(tar(members))
    rows = datasets.load_dataset("webdataset", data_files=str(tmp_path / "0.tar"), split="train", streaming=True)
    assert [sorted(row["json"]) for row in rows] == [["text"]] * 7 and not any("txt" in row for row in rows)
