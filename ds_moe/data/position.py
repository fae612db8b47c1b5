"""The place in the data that a checkpoint holds, and whether the data go on from there."""

from collections.abc import Mapping

from ds_moe.config.run import RunConfig
from ds_moe.data.record_kind import Records

DataPosition = Mapping[str, int | str]  # as a checkpoint's state.json holds it
FILE = "data.train sha256"
PACKING, ROW = "data.packing", "train.tokens_per_micro_batch"  # of packed rows alone


def order_of(config: RunConfig, records: Records | None = None) -> dict[str, int | str]:
    """Everything that the order of the data depends on, by the run file's names; of `records` too if they are known."""
    of_file = {FILE: records.sha256, "data.train records": len(records)} if records is not None else {}
    return {
        **of_file,
        "train.seed": config.train.seed,
        "train.global_batch_size": config.train.global_batch_size,
        "data.shuffle": config.data.shuffle,
        "data.length_grouping": config.data.length_grouping,
        **({PACKING: True, ROW: config.tokens_per_row} if config.data.packing else {}),
    }


def same_file(saved: DataPosition, order: DataPosition) -> bool:
    """Whether a saved position is one in the file that the run reads now, see `order_of`."""
    return saved.get(FILE) == order.get(FILE)


def position_problems(saved: DataPosition, order: DataPosition) -> list[str]:
    """Why the data would not go on where a checkpoint stopped; `order` is that of the run now."""
    saved, order = {PACKING: False, **saved}, {PACKING: False, **order}
    if saved[PACKING] != order[PACKING]:
        order = {key: value for key, value in order.items() if key != ROW}
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
