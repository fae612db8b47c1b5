"""The place in the data that a checkpoint holds, and whether the data go on from there."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ds_moe.config.run import RunConfig
from ds_moe.data.order import EpochOrder
from ds_moe.data.record_kind import Records
from ds_moe.data.sources.mixture import mixture_of
from ds_moe.distributed import over_ranks
from ds_moe.errors import UserError

DataPosition = Mapping[str, Any]  # of numbers, texts and lists of them, as a checkpoint's state.json holds it
FILE = "data.train sha256"
SOURCE = re.compile(r"data\.train\.\d+ sha256")  # of each of several sources
MIXTURE = "records of each source in an epoch"  # of a mixture alone
STREAMING, WINDOW = "data.streaming", "data.shuffle_window_mb"  # of streamed records alone
WEIGHTS = "weights of the sources"  # of a streamed mixture alone
PACKING, ROW = "data.packing", "train.tokens_per_micro_batch"  # of packed rows alone


def order_of(config: RunConfig, records: Records | None = None) -> dict[str, int | str]:
    """Everything that the order of the data depends on, by the run file's names; of `records` too if they are known."""
    of_data: dict[str, int | str] = {}
    if records is not None:
        of_data = {FILE: records.sha256, "data.train records": len(records)}
        of_data |= {f"data.train.{number} sha256": one.sha256 for number, one in enumerate(records.sources)}
        if mixture := mixture_of(config.data, records):
            of_data[MIXTURE] = ", ".join(map(str, mixture.quotas))
    return {**of_data, **_of_config(config)}


def streamed_order_of(
    config: RunConfig, sha256: Sequence[str], weights: Sequence[float | None]
) -> dict[str, int | str]:
    """As `order_of`, of streamed sources by what is known of each before it is read."""
    of_data: dict[str, int | str] = {FILE: sha256[0]}
    if len(sha256) > 1:
        of_data = {FILE: hashlib.sha256(" ".join(sha256).encode()).hexdigest()}
        of_data |= {f"data.train.{number} sha256": one for number, one in enumerate(sha256)}
        of_data[WEIGHTS] = ", ".join(map(str, weights))
    return {**of_data, **_of_config(config)}


def _of_config(config: RunConfig) -> dict[str, int | str]:
    data = config.data
    return {
        "train.seed": config.train.seed,
        "train.global_batch_size": config.train.global_batch_size,
        "data.shuffle": data.shuffle,
        "data.length_grouping": data.length_grouping,
        **({STREAMING: True, WINDOW: data.shuffle_window_mb} if data.streaming else {}),
        **({PACKING: True, ROW: config.tokens_per_row} if data.packing else {}),
    }


def epoch_order_of(config: RunConfig, records: Records, lengths: np.ndarray | None = None) -> EpochOrder:
    """The order of a run's records. `lengths`: tokens of each record, where more than estimates are known."""
    train, data = config.train, config.data
    lengths = records.lengths if lengths is None else lengths
    sizes = train.global_batch_size, train.seed
    return EpochOrder(lengths, *sizes, data.shuffle, data.length_grouping, mixture_of(data, records))


def check_same_data(order: DataPosition, split: str = "data.train") -> None:
    """Raise `UserError` on every rank where one reads other data than rank 0 does (collective).

    Hosts may have other copies of a path, or other commits of a dataset of the hub in their caches.
    """
    of_ranks = over_ranks(dict(order))
    for rank, other in enumerate(of_ranks):
        for key in (*of_ranks[0], *other):
            first, here = of_ranks[0].get(key, "absent"), other.get(key, "absent")
            if first != here:
                text = f"{split}: ranks read different data: {key} is {first!r} on rank 0 and {here!r} on rank {rank}"
                raise UserError(f"{text} (give every host the same files; of a hub dataset, set revision to a commit)")


def same_file(saved: DataPosition, order: DataPosition) -> bool:
    """Whether a saved position is one in the file that the run reads now, see `order_of`."""
    return saved.get(FILE) == order.get(FILE)


def position_problems(saved: DataPosition, order: DataPosition) -> list[str]:
    """Why the data would not go on where a checkpoint stopped; `order` is that of the run now."""
    absent = {PACKING: False, STREAMING: False}
    saved, order = {**absent, **saved}, {**absent, **order}
    if saved[STREAMING] != order[STREAMING]:
        order = {STREAMING: order[STREAMING]}  # nothing else can be compared
    elif saved[PACKING] != order[PACKING]:
        order = {key: value for key, value in order.items() if key != ROW}
    if FILE in order:
        saved, order = _of_equal_sources(saved, order)
    missing = [key for key in ("epoch", "step", *order) if key not in saved]
    if missing:
        return [f"train.resume: the checkpoint's data position lacks {missing[0]!r} (use another checkpoint)"]
    return [
        f"train.resume: the checkpoint's data position has {key} {saved[key]!r} (use another)"
        for key in ("epoch", "step")
        if type(saved[key]) is not int or saved[key] < 0
    ] + [
        f"train.resume: {key} was {saved[key]!r} in the checkpoint and is {now!r} now, so the data would not go on "
        "where they stopped (restore it, or start anew in another train.output_dir)"
        for key, now in order.items()
        if saved[key] != now
    ]


def _of_equal_sources(saved: DataPosition, order: DataPosition) -> tuple[DataPosition, DataPosition]:
    """Both with an entry for every source that one of them has. Of several sources those that changed are named, and
    not their sum."""
    keys = dict.fromkeys(key for key in (*order, *saved) if SOURCE.fullmatch(key) or key in (MIXTURE, WEIGHTS))
    absent = dict.fromkeys(keys, "absent")
    saved, order = {**absent, **saved}, {**order, **{key: order.get(key, "absent") for key in keys}}
    if any(saved[key] != order[key] for key in keys if key not in (MIXTURE, WEIGHTS)):
        order = {key: value for key, value in order.items() if key not in (FILE, "data.train records")}
    return saved, order
