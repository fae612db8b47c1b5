"""Row groups of Parquet, within limits: a column that names one value a million times takes a few bytes of a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_moe.data.sources.unpack import ALWAYS, MOST_TIMES
from ds_moe.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS_AT_ONCE = 1024


def check_expansion(metadata: pq.FileMetaData, name: str) -> None:
    """Raise `UserError` where a row group says that it takes too much memory."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if group.total_byte_size > (most := _most_bytes(group)):
            raise _too_much(name, number, most)


def read_group(file: pq.ParquetFile, number: int, name: str) -> pa.Table:
    """A row group. Raises `UserError` where it unpacks to more than MOST_TIMES its size, before it is all in memory."""
    import pyarrow as pa

    group = file.metadata.row_group(number)
    most, size, batches = _most_bytes(group), 0, []
    for batch in file.iter_batches(min(ROWS_AT_ONCE, max(group.num_rows, 1)), row_groups=[number]):
        size += batch.nbytes
        if size > most:
            raise _too_much(name, number, most)
        batches.append(batch)
    return pa.Table.from_batches(batches, file.schema_arrow).combine_chunks()


def _most_bytes(group: pq.RowGroupMetaData) -> int:
    packed = sum(group.column(column).total_compressed_size for column in range(group.num_columns))
    return max(ALWAYS, MOST_TIMES * packed)


def _too_much(name: str, number: int, most: int) -> UserError:
    fix = "if it is meant, write it as JSONL, or in smaller row groups without a dictionary"
    return UserError(
        f"data: {name}: row group {number + 1} unpacks to more than {most:,} bytes, {MOST_TIMES} times its size ({fix})"
    )
