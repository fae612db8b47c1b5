"""Rows of Arrow as values, and the batches of a stream, as `save_to_disk` writes it: all of them, or an error.

Readers of Arrow take a stream that ends between two batches for a whole one, and pass over what stands behind its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ds_moe.data.images import RecordError
from ds_moe.errors import one_line

if TYPE_CHECKING:
    import pyarrow as pa

END = b"\xff\xff\xff\xff\0\0\0\0"  # the mark of the end


def values_of(row: pa.Table | pa.RecordBatch) -> dict[str, object]:
    """The columns of a table of one row. Raises `RecordError` where Python has no such value, as of broken UTF-8."""
    from pyarrow import ArrowException

    try:
        return row.to_pylist()[0]
    except (ValueError, OverflowError, ArrowException) as error:
        raise RecordError(f"a value cannot be read: {one_line(error)} (correct it, or leave the column out)") from error


def record_batches(path: Path) -> tuple[pa.Schema, list[int], list[int]]:
    """(schema, where each batch begins and the last one ends, rows of each), by headers alone.

    Raises:
        ValueError: the stream is cut off, goes on behind its end, or holds anything but rows.
        Exception: what pyarrow raises for a file that is none.
    """
    import pyarrow as pa

    offsets, rows = [], []
    with pa.memory_map(str(path)) as mapped:
        schema = pa.ipc.read_schema(pa.ipc.read_message(mapped))
        while True:
            offset = mapped.tell()
            mapped.seek(offset)
            if mapped.read(len(END)) == END:
                break
            if offset == mapped.size():
                raise ValueError("it is cut off: it has no mark of its end (copy it again)")
            mapped.seek(offset)
            message = pa.ipc.read_message(mapped)
            if message.type != "record batch":
                raise ValueError(f"a {message.type} between its rows")
            offsets.append(offset)
            rows.append(pa.ipc.read_record_batch(message, schema).num_rows)
        if mapped.size() != offset + len(END):
            raise ValueError(f"it goes on behind its end at byte {offset}: two files in one? (save it again)")
    return schema, [*offsets, offset], rows
