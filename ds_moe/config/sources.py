"""What the paths of sources say before anything is opened."""

from pathlib import PurePosixPath

from ds_moe.config.sections import Sources, sources_of

HUB = "hub:"  # before OWNER/NAME of a dataset on the Hugging Face hub
ENDINGS = (".gz", ".zst", ".jsonl", ".ndjson", ".json", ".parquet", ".tar")


def source_names(given: Sources | None) -> list[str]:
    """A name for each source: its own, or else the last part of its path without endings and wildcards."""
    return [source.name or _last_part(source.path) for source in sources_of(given)]


def _last_part(path: str) -> str:
    parts = [part for part in PurePosixPath(path.removeprefix(HUB)).parts if not set(part) & set("*?[{")]
    name = parts[-1] if parts else path
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return name or path
