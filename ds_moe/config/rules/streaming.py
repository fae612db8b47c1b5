"""Rules about `data.streaming`: a run whose records are not known before they are read."""

from collections.abc import Iterator

from ds_moe.config.rules.rule import Complaint
from ds_moe.config.run import RunConfig, other_task
from ds_moe.config.sections import MixtureConfig, has_digits, sources_of

KEY = "data.streaming"


def contradictions(config: RunConfig) -> Iterator[Complaint]:
    if not config.data.streaming:
        return
    if other := other_task(config, "sft"):
        text = f"{KEY} is for task sft: task {other} asks something of all records before its first step"
        yield KEY, f"{text}; remove it"
    if has_digits(config.data.train):
        yield KEY, f"{KEY} reads files, and data.train is digits; remove it"
    counts = f"counts records, which {KEY} does not know before a pass over them"
    if config.train.epochs is not None:
        yield "train.epochs", f"train.epochs {counts}; set train.steps instead"
    if any(source.epochs is not None for source in sources_of(config.data.train)):
        yield "data.train", f"data.train: epochs of a source {counts}; give each a weight instead"
    if config.data.mixture != MixtureConfig():
        yield "data.mixture", f"data.mixture {counts}; give each source a weight instead"
