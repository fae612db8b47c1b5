"""Blocks of files hold every record once, wherever their bounds fall."""

import json
import os
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_moe.config.sections import SourceConfig
from ds_moe.data import blocks as blocks_module
from ds_moe.data.blocks import Blocks, JsonlBlock, Source
from ds_moe.data.images import RecordError
from ds_moe.data.record_kind import CHAT
from ds_moe.data.sources.arrow import ArrowRecords
from ds_moe.data.sources.arrow_stream import record_batches
from ds_moe.data.sources.as_opened import FileAsOpened
from ds_moe.data.sources.files import DataFile, data_file
from ds_moe.data.sources.find import data_files
from ds_moe.data.sources.indexed import Reading
from ds_moe.errors import UserError


def source(*files, name=None):
    return Source(tuple(data_file(file, str(file)) for file in files), name)


def all_rows(blocks):
    for number in range(len(blocks)):
        block = blocks.read(number)
        yield from ((block, row) for row in range(len(block)))


def lines_with_surprises(seed):
    """Bytes of a file: lines of very different lengths, blank ones, several ends of a line, letters of four bytes."""
    chance = random.Random(seed)
    lines = []
    for number in range(chance.randrange(60)):
        text = "é𝄞x"[chance.randrange(3)] * chance.choice([0, 1, 5, 40, 300])
        lines.append(json.dumps({"n": number, "text": text}, ensure_ascii=False).encode())
        lines += [chance.choice([b"", b"  ", b"\t \r"])] * (chance.random() < 0.2)
    ends = [chance.choice([b"\n", b"\r\n"]) for _ in lines]
    whole = b"".join(line + end for line, end in zip(lines, ends, strict=True))
    return whole.rstrip(b"\r\n") if chance.random() < 0.5 else whole


@pytest.mark.parametrize("size", [1, 2, 7, 64, 4096])
def test_every_line_lies_in_the_block_in_which_it_begins(tmp_path, monkeypatch, size):
    monkeypatch.setattr(blocks_module, "BLOCK", size)
    for seed in range(12 if size > 2 else 3):
        file = tmp_path / f"{seed}.jsonl"
        file.write_bytes(lines_with_surprises(seed) or b"\n")
        expected = [json.loads(line) for line in file.read_bytes().split(b"\n") if line.strip()]
        blocks = Blocks.of([source(file)])
        found = list(all_rows(blocks))
        assert [block.record(row) for block, row in found] == expected
        assert len(blocks) == -(-file.stat().st_size // size) and blocks.sizes.sum() == file.stat().st_size
        for block, row in found:
            name, _, byte = block.where(row).rpartition("@")
            with open(name, "rb") as whole:
                whole.seek(int(byte))
                line = whole.readline()
            assert json.loads(line) == block.record(row) and len(line) == block.length(row)


def test_a_line_is_lost_where_blocks_do_not_look_at_the_byte_before_them(tmp_path):
    """The negative control: a line that begins exactly with a block is found by that byte alone."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a":1}\n{"a":2}\n')
    found = data_file(file, "a"), FileAsOpened.of(file, "a")
    assert [len(JsonlBlock(*found, start, start + 8)) for start in (0, 8)] == [1, 1]
    raw = np.frombuffer(file.read_bytes()[8:16], dtype=np.uint8)
    assert np.flatnonzero(raw[:-1] == ord("\n")).size == 0


def test_rows_of_parquet_know_their_place_and_their_bytes(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "ä" * number}] * (number % 3), "image": {"bytes": b"x" * number}}
        for number in range(1, 24)
    ]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=5)
    blocks = Blocks.of([source(file)])
    found = list(all_rows(blocks))
    assert len(blocks) == 5 and [block.record(row) for block, row in found] == rows
    assert [block.where(row) for block, row in found] == [f"{file}:{number}" for number in range(1, 24)]
    lengths = [block.length(row) for block, row in found]
    assert lengths == [(4 + 2 * number) * (number % 3) + number for number in range(1, 24)]


def test_a_column_that_names_one_value_many_times_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 1000] * 5000}), file)
    assert file.stat().st_size < 5000
    assert len(Blocks.of([source(file)]).read(0).record(0)["text"]) == 1000
    monkeypatch.setattr("ds_moe.data.sources.parquet.ALWAYS", 2**20)
    with pytest.raises(UserError, match="a.parquet: row group 1 unpacks to more than 1,048,576 bytes, 200 times"):
        Blocks.of([source(file)]).read(0).record(0)
    pq.write_table(pa.table({"text": ["x" * 2**21]}), file, compression="zstd", use_dictionary=False)
    for opened in (lambda: Blocks.of([source(file)]), lambda: rows_of(file, "parquet")):
        with pytest.raises(UserError, match="a.parquet: row group 1 unpacks|a: row group 1 unpacks"):
            opened()


def test_record_batches_of_a_saved_dataset_are_blocks(tmp_path):
    import datasets

    rows = [{"messages": [{"role": "user", "content": f"number {number}"}]} for number in range(25)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=2)
    files = data_files(SourceConfig(path=str(tmp_path / "saved")))
    found = list(all_rows(Blocks.of([Source(tuple(files))])))
    assert [block.record(row) for block, row in found] == rows
    assert [block.where(row) for block, row in found][-1] == f"{files[1].path}:12"
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=4)
    blocks = Blocks.of([Source((DataFile(tmp_path / "a.arrow", "a", "arrow"),))])
    assert len(blocks) == 7 and [block.record(row) for block, row in all_rows(blocks)] == rows


def test_the_blocks_of_several_files_and_sources_know_whose_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks_module, "BLOCK", 16)
    files = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for number, file in enumerate(files):
        file.write_text(f'{{"file": {number}}}\n' * (3 * number))  # the first is empty
    blocks = Blocks.of([source(files[0], files[1], name="one"), source(files[2], name="two")])
    found = [(blocks.source(number), blocks.read(number).file.path) for number in range(len(blocks))]
    assert set(found) == {(0, files[1]), (1, files[2])}
    assert [block.record(row)["file"] for block, row in all_rows(blocks)] == [1] * 3 + [2] * 6


def test_large_data_have_larger_blocks_and_no_more_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks_module, "MOST_BLOCKS", 8)
    file = tmp_path / "sparse.jsonl"
    with file.open("wb") as sparse:
        sparse.truncate(100 * blocks_module.BLOCK)
    blocks = Blocks.of([source(file)])
    assert len(blocks) == 7 and blocks.sizes[0] == 16 * blocks_module.BLOCK


def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    def refused(name, content, match, read=True):
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError, match=match) as caught:
            found = Blocks.of([source(file)])
            if read:
                found.read(0)
        assert "\n" not in str(caught.value)

    refused("lacking.jsonl", None, "does not exist")
    refused("empty.jsonl", b"", "empty.jsonl has no record to use .empty.")
    with pytest.raises(UserError, match="empty.jsonl and 1 more files have no record"):
        Blocks.of([source(tmp_path / "empty.jsonl", tmp_path / "empty.jsonl")])
    refused("table.csv", b"a,b\n", "neither")
    refused("packed.jsonl.gz", b"", "is compressed")
    refused("archive.tar", b"", "is an archive")
    refused("torn.parquet", b"PAR1 and nothing else", "not a Parquet file that can be read")
    refused("array.jsonl", b'[\n{"a": 1}\n]\n', "a JSON array")
    monkeypatch.setattr(blocks_module, "MAX_LINE", 64)
    refused("long.jsonl", b'{"a": "' + b"x" * 64 + b'"}\n', "long.jsonl@0: a line of more than 64 bytes")


def test_a_file_that_changes_while_it_is_read_ends_the_run(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n')
    blocks = Blocks.of([source(file)])
    file.write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(UserError, match="has changed since the run opened it"):
        blocks.read(0)
    file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        blocks.read(0)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "arrow"])
def test_a_file_of_equal_size_and_as_many_rows_has_changed_too(tmp_path, form):
    file = DataFile(tmp_path / f"a.{form}", "a", form)

    def write(answer):
        table = pa.Table.from_pylist([{"answer": answer}] * 3)
        if form == "jsonl":
            file.path.write_text(f'{{"answer": "{answer}"}}\n' * 3)
        elif form == "parquet":
            pq.write_table(table, file.path)
        else:
            with pa.OSFile(str(file.path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
        return file.path.stat().st_size

    size = write("yes")
    blocks = Blocks.of([Source((file,))])
    assert blocks.read(0).record(0) == {"answer": "yes"}
    assert write("not") == size
    os.utime(file.path, ns=(0, 1))
    with pytest.raises(UserError, match="a: has changed since the run opened it"):
        blocks.read(0).record(0)


def test_an_arrow_file_that_lacks_rows_or_has_some_behind_its_end_is_refused(tmp_path):
    table = pa.Table.from_pylist([{"answer": "yes"}] * 8)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=4)
    whole, file = sink.getvalue().to_pybytes(), tmp_path / "a.arrow"
    file.write_bytes(whole)
    _, offsets, rows = record_batches(file)
    assert rows == [4, 4] and offsets[-1] == len(whole) - 8
    for torn, says in (
        (whole[: offsets[1]], "cut off"),
        (whole[: offsets[2]], "cut off"),
        (whole * 2, "goes on behind its end"),
    ):
        file.write_bytes(torn)
        for opened in (lambda: Blocks.of([Source((DataFile(file, "a", "arrow"),))]), lambda: rows_of(file)):
            with pytest.raises(UserError, match=says):
                opened()


def test_values_that_python_does_not_have_are_bad_records(tmp_path):
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 2, 4], np.int32)), pa.py_buffer(b"ok\xff\xfe"))
    times = pa.array([0, 2**62], pa.int64()).cast(pa.timestamp("s"))
    for column in (broken, times):
        table, file = pa.table({"text": column}), tmp_path / "a.arrow"
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        block = Blocks.of([Source((DataFile(file, "a", "arrow"),))]).read(0)
        assert "text" in block.record(0)
        with pytest.raises(RecordError, match="a value cannot be read"):
            block.record(1)
        assert [bad.where for bad in rows_of(file).bad if "a value cannot be read" in bad.reason] == ["a:2"]


def rows_of(file, form="arrow"):
    """The same file with an index."""
    reading = Reading(record_kind=CHAT, max_pixels=10**6, cache_dir=file.parent)
    return ArrowRecords(DataFile(file, "a", form), reading)


def test_a_run_knows_the_files_it_was_started_with(tmp_path):
    def sha256(content, name="a.jsonl"):
        file = tmp_path / name
        file.write_bytes(content)
        return Blocks.of([source(file)]).sha256

    one = sha256(b'{"a": 1}\n' * 4000)
    assert one == sha256(b'{"a": 1}\n' * 4000)
    others = {
        sha256(b'{"a": 1}\n' * 4001),
        sha256(b'{"a": 2}\n' + b'{"a": 1}\n' * 3999),
        sha256(b'{"a": 1}\n' * 3999 + b'{"a": 2}\n'),
        sha256(b'{"a": 1}\n' * 4000, "b.jsonl"),
    }
    assert len(others) == 4 and one not in others
    file, some = tmp_path / "a.jsonl", np.full(10**6, ord("x"), np.uint8)
    whole = sha256(some.tobytes())
    some[300_000:320_000] = ord("y")  # between its start, its middle and its end
    assert sha256(some.tobytes()) != whole and file.stat().st_size == 10**6


def test_a_broken_line_is_a_record_that_cannot_be_used(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": \n{"a": 1, "a": 2}\n\xff\xfe\n')
    block = Blocks.of([source(file)]).read(0)
    assert len(block) == 4
    for row in (1, 2, 3):
        with pytest.raises(RecordError):
            block.record(row)
