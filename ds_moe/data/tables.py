"""Blocks of files whose rows are Arrow: row groups of Parquet, and record batches as `save_to_disk` writes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ds_moe.data.sources.arrow_stream import record_batches, values_of
from ds_moe.data.sources.as_opened import FileAsOpened
from ds_moe.data.sources.files import DataFile
from ds_moe.data.sources.parquet import check_expansion, read_group
from ds_moe.errors import UserError, one_line

if TYPE_CHECKING:
    import pyarrow as pa


class TableBlock:
    """Rows of Arrow that lie together in a file; their number is known before they are read.

    Args:
        first: the number of the first one, from 0.
        read: gives them.
    """

    def __init__(
        self,
        file: DataFile,
        opened: FileAsOpened,
        first: int,
        rows: int,
        read: Callable[[], pa.Table | pa.RecordBatch],
    ) -> None:
        self.file, self._opened, self._first, self._rows, self._read = file, opened, first, rows, read

    def __len__(self) -> int:
        return self._rows

    @cached_property
    def _table(self) -> pa.Table | pa.RecordBatch:
        from pyarrow import ArrowException

        try:
            table = self._read()
        except (OSError, ValueError, IndexError, NotImplementedError, ArrowException) as error:
            self._opened.check()
            where = f"{self.file.name}: rows from {self._first + 1} on"
            raise UserError(f"{where} cannot be read ({one_line(error)})") from error
        self._opened.check()  # what was read is what was opened
        return table

    @cached_property
    def _lengths(self) -> np.ndarray:
        return sum((_bytes_of(column) for column in self._table.columns), np.zeros(self._rows, np.int64))

    def length(self, row: int) -> int:
        return int(self._lengths[row])

    def record(self, row: int) -> object:
        return values_of(self._table.slice(row, 1))

    def where(self, row: int) -> str:
        return f"{self.file.name}:{self._first + row + 1}"


def _bytes_of(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """(rows,) int64: the bytes of all texts and binaries in each row of a column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(values, pa.ChunkedArray):
        parts = [_bytes_of(chunk) for chunk in values.chunks]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)
    kind = values.type
    if pa.types.is_struct(kind):
        return sum((_bytes_of(values.field(index)) for index in range(kind.num_fields)), np.zeros(len(values), int))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inside = _bytes_of(values.flatten())
        parents = pc.list_parent_indices(values).to_numpy(zero_copy_only=False)
        return np.bincount(parents, weights=inside, minlength=len(values)).astype(np.int64)
    if any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary,
                                   pa.types.is_large_binary)):  # fmt: skip
        return pc.fill_null(pc.binary_length(values), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.zeros(len(values), np.int64)


class ParquetShard:
    """A block is a row group, which the file's end lists. Raises what pyarrow raises for a file that is none."""

    def __init__(self, file: DataFile, opened: FileAsOpened) -> None:
        import pyarrow.parquet as pq

        self.file, self.opened, footer = file, opened, pq.read_metadata(file.path)
        check_expansion(footer, file.name)
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        self.sizes = np.array([group.total_byte_size for group in groups], dtype=np.int64)
        self.rows = np.array([group.num_rows for group in groups], dtype=np.int64)
        self._first = np.cumsum([0, *self.rows])

    def read(self, block: int) -> TableBlock:
        first, end = self._first[block : block + 2].tolist()
        return TableBlock(self.file, self.opened, first, end - first, lambda: self._group(block))

    def _group(self, number: int) -> pa.Table:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.file.path) as file:
            return read_group(file, number, self.file.name)


class ArrowShard:
    """A block is a record batch of a stream, as `save_to_disk` writes it. Their headers are walked through once.

    Raises what pyarrow raises for a file that is none.
    """

    def __init__(self, file: DataFile, opened: FileAsOpened) -> None:
        self.file, self.opened = file, opened
        self._schema, offsets, rows = record_batches(file.path)
        self._offsets = np.array(offsets, dtype=np.int64)
        self.sizes, self.rows = np.diff(self._offsets), np.array(rows, dtype=np.int64)
        self._first = np.cumsum([0, *rows])

    def read(self, block: int) -> TableBlock:
        first, end = self._first[block : block + 2].tolist()
        return TableBlock(self.file, self.opened, first, end - first, lambda: self._batch(block))

    def _batch(self, number: int) -> pa.RecordBatch:
        import pyarrow as pa

        with pa.OSFile(str(self.file.path)) as file:
            file.seek(int(self._offsets[number]))
            return pa.ipc.read_record_batch(pa.ipc.read_message(file), self._schema)
