"""Rows of Arrow: Parquet files, and the files of folders that `save_to_disk` has written. Both are memory-mapped."""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ds_moe.data.record_kind import Parsed
from ds_moe.data.sources.arrow_stream import record_batches, values_of
from ds_moe.data.sources.as_opened import readable
from ds_moe.data.sources.files import DataFile
from ds_moe.data.sources.indexed import IndexedRecords, Reading
from ds_moe.data.sources.parquet import check_expansion
from ds_moe.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


class ArrowRecords(IndexedRecords["pa.Table", Parsed]):
    """One record a row; its key is the index of the row."""

    def __init__(self, file: DataFile, reading: Reading[Parsed]):
        import datasets  # an import of a second, which JSONL does not need
        import pyarrow.parquet
        from datasets.exceptions import DatasetGenerationError

        of_libraries = pyarrow.ArrowException, DatasetGenerationError
        datasets.disable_progress_bars()
        try:
            if file.form == "parquet":
                check_expansion(pyarrow.parquet.read_metadata(file.path), file.name)
                rows = datasets.Dataset.from_parquet(str(file.path), cache_dir=str(reading.cache_dir))
            else:
                record_batches(file.path)  # `from_file` would not say that some are missing
                rows = datasets.Dataset.from_file(str(file.path))
        except (OSError, EOFError, ValueError, NotImplementedError, *of_libraries) as error:
            what = "a Parquet file" if file.form == "parquet" else "an Arrow file of `save_to_disk`"
            reason = " ".join(str(error.__cause__ or error).split())
            raise UserError(f"data: {file.name} is not {what} that can be read ({reason})") from error
        self._table: Dataset = rows.with_format("arrow")  # raw values, so that no Image column is decoded
        super().__init__(file, reading)
        with readable(file.name), file.path.open("rb") as stream:
            self.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()

    def _walk(self) -> Iterator[tuple[int, int, "pa.Table"]]:
        return ((row, row + 1, self._read(row)) for row in range(len(self._table)))

    def _read(self, key: int) -> "pa.Table":
        return self._table[key : key + 1]

    def _decode(self, raw: "pa.Table") -> object:
        return values_of(raw)
