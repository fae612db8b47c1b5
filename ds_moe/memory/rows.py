"""The longest packed rows that fit."""

from bisect import bisect_left
from collections.abc import Callable

from ds_moe.config.run import RunConfig

STEP = 256  # tokens
LONGEST = 2**20  # tokens; nothing longer is looked at


def largest_row(config: RunConfig, fits: Callable[[RunConfig], bool]) -> int | None:
    """The largest `train.tokens_per_micro_batch` with which a packed run fits, in steps of 256 from `data.max_length`.

    Args:
        fits: whether a run file like this one does; longer rows never need less.

    Returns:
        None if not even rows for one sample of `data.max_length` fit.
    """
    rows = range(config.data.max_length, max(LONGEST, config.data.max_length) + 1, STEP)
    count = bisect_left(rows, True, key=lambda tokens: not fits(_with_rows_of(config, tokens)))
    return rows[count - 1] if count else None


def _with_rows_of(config: RunConfig, tokens: int) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"tokens_per_micro_batch": tokens})})
