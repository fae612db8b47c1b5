"""The data files of a source, wherever they are."""

from ds_moe.config.sections import SourceConfig
from ds_moe.config.sources import HUB
from ds_moe.data.sources.files import MOST_FILES, DataFile, local_files
from ds_moe.data.sources.hub import hub_files
from ds_moe.errors import UserError


def data_files(source: SourceConfig) -> list[DataFile]:
    """The files of a source in a fixed order. Raises `UserError` as `local_files` and `hub_files`, and for too many."""
    files = hub_files(source) if source.path.startswith(HUB) else local_files(source)
    if len(files) > MOST_FILES:
        raise UserError(f"data: {source.path} names more than {MOST_FILES:,} files (name fewer by a pattern)")
    return files
