"""Prepares the benchmark's records, as `ds-moe data prepare` does."""

from pathlib import Path

from ds_moe.config.run import RunConfig
from ds_moe.data.prepared.make import prepare
from ds_moe.data.record_kind import CHAT
from ds_moe.data.records import read_records
from ds_moe.models.processor import load_processor
from tools.bench.data.loaders import MAX_LENGTH, MAX_PIXELS


def prepare_records(file: Path, model: Path) -> None:
    """Into a folder beside the file, with images."""
    data = {"train": str(file), "prepared": str(file.parent / "prepared")}
    data |= {"max_length": MAX_LENGTH, "max_pixels": MAX_PIXELS}
    config = RunConfig(model={"path": str(model)}, data=data, deepspeed="-")
    records = read_records(str(file), config.data, record_kind=CHAT)
    prepare(config, "train", records, load_processor(model), pixels=True, workers=2, note=lambda line: None)
