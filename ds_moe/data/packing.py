"""Which samples of an optimizer step lie in which packed row: a function of their sizes, the row's and the ranks.

A step's samples are those that `EpochOrder` draws, whatever the number of ranks. They fill world x m rows of at most
`capacity` tokens, m as small as possible; a sample is never cut. In a micro-step each rank runs one row and waits for
the slowest: so rows are balanced by what they cost, and a micro-step takes rows of like cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np

from ds_moe.data.order import FILLER, EpochOrder, Rows


@dataclass(frozen=True)
class PackedRows:
    """The rows of every step of a run, see `plan_rows`. A record of 0 tokens cannot be used and lies nowhere.

    Attributes:
        tokens: (records,) int64, exact.
        patches: (records,) int64, those that the vision tower gets.
        patch_cost: time of a patch in that of a token.
        capacity: tokens of a row.
    """

    order: EpochOrder
    tokens: np.ndarray
    patches: np.ndarray
    patch_cost: float
    capacity: int
    world_size: int

    def of_step(self, position: int) -> Rows:
        """The records of each row; [FILLER] where a rank has nothing in a micro-step."""
        drawn = np.array(self.order.global_batch(position))
        drawn = drawn[drawn != FILLER]
        drawn = drawn[self.tokens[drawn] > 0]
        return pack(drawn, self.tokens, self.patches, self.patch_cost, self.capacity, self.world_size)

    def outlook(self, steps: int = 4) -> Fill:
        """How full the rows of the first steps of a run are."""
        first = range(min(steps, self.order.steps_per_epoch))
        return reduce(add, [self.fill(self.of_step(step)) for step in first])

    def fill(self, rows: Rows) -> Fill:
        """How full the rows of a step are."""
        return Fill.of_rows(rows, self.tokens, self.capacity)


@dataclass(frozen=True)
class Fill:
    """How full the rows of steps are; sums of several steps add up."""

    steps: int
    rows: int  # of all ranks and micro-steps
    micro_steps: int
    tokens: int
    room: int  # tokens that the rows could hold
    critical: int  # tokens of the longest row of each micro-step, times the ranks

    @classmethod
    def of(cls, tokens_MR: list[np.ndarray], capacity: int) -> Fill:
        """Of one step, from the tokens of each micro-step's rows."""
        rows = sum(len(tokens_R) for tokens_R in tokens_MR)
        critical = sum(int(tokens_R.max()) * len(tokens_R) for tokens_R in tokens_MR)
        return cls(1, rows, len(tokens_MR), sum(int(one.sum()) for one in tokens_MR), rows * capacity, critical)

    @classmethod
    def of_rows(cls, rows: Rows, tokens: np.ndarray, capacity: int) -> Fill:
        """Of one step, from what lies in its rows; `tokens` are those of each record."""
        used = [[sum(int(tokens[one]) for one in row if one != FILLER) for row in step] for step in rows]
        return cls.of([np.array(of_rank) for of_rank in used], capacity)

    def __add__(self, other: Fill) -> Fill:
        return Fill(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __str__(self) -> str:
        a_step = f"{self.rows / self.steps:,.1f} rows a step ({self.micro_steps / self.steps:.1f} micro-batches a rank)"
        return f"{a_step}, {self.share:.0%} full, {self.critical_share:.0%} of the critical path are real tokens"

    @property
    def share(self) -> float:
        """Tokens in what the rows could hold."""
        return self.tokens / self.room

    @property
    def critical_share(self) -> float:
        """Real tokens in those that all ranks would compute at the pace of the slowest one of each micro-step."""
        return self.tokens / max(self.critical, 1)


def pack(
    drawn: np.ndarray, tokens: np.ndarray, patches: np.ndarray, patch_cost: float, capacity: int, world_size: int
) -> Rows:
    """Rows of the records `drawn`, by the sizes of all records; [FILLER] where a rank has nothing in a micro-step."""
    tokens_N = tokens[drawn]
    laid = plan_rows(tokens_N, tokens_N + patch_cost * patches[drawn], capacity, world_size)
    return [[drawn[row].tolist() or [FILLER] for row in micro_step] for micro_step in laid]


def plan_rows(tokens_N: np.ndarray, cost_N: np.ndarray, capacity: int, world_size: int) -> Rows:
    """Rows of the N samples, as positions in `tokens_N`; a rank may have nothing in a micro-step, but never all ranks.

    A number m of micro-steps is taken, from the least that could hold the tokens, as soon as the samples fit by either
    of two rules: longest processing time first (Graham 1969), which balances; best fit decreasing, which fits more.

    Args:
        tokens_N: (N,) int64, at most `capacity` each.
        cost_N: (N,) float64, the time of each sample in any unit, above 0.
        capacity: tokens of a row.
    """
    micro_steps = max(1, -(-int(tokens_N.sum()) // (capacity * world_size)))
    while True:
        count = micro_steps * world_size
        balanced = _laid(tokens_N, cost_N, cost_N, capacity, count)
        laid = balanced or _laid(tokens_N, tokens_N, -tokens_N, capacity, count)  # the fullest row weighs least
        if laid is not None:
            break
        micro_steps += 1
    cost_R = np.array([cost_N[row].sum() for row in laid])
    by_cost = [laid[row] for row in np.argsort(-cost_R, kind="stable")]
    # Ranks that do not wait for each other within a step also end it together: every other micro-step runs backwards.
    return [
        by_cost[start : start + world_size][:: -1 if number % 2 else 1]
        for number, start in enumerate(range(0, count, world_size))
    ]


def rows_in_order(indices: list[int], tokens: np.ndarray, capacity: int, world_size: int) -> Rows:
    """Rows of neighbours, which all ranks take in turn: what they find lies in the order of `indices`."""
    rows: list[list[int]] = []
    room = 0
    for index in indices:
        if tokens[index] > room:
            rows.append([])
            room = capacity
        rows[-1].append(index)
        room -= int(tokens[index])
    rows += [[FILLER]] * (-len(rows) % world_size)
    return [rows[start : start + world_size] for start in range(0, len(rows), world_size)]


def _laid(
    tokens_N: np.ndarray, by: np.ndarray, weight_N: np.ndarray, capacity: int, count: int
) -> list[list[int]] | None:
    """The sample largest in `by` of those left goes to the lightest row that has room; None: there is none for one."""
    rows: list[list[int]] = [[] for _ in range(count)]
    room_R, weight_R = np.full(count, float(capacity)), np.zeros(count)
    for sample in np.argsort(-by, kind="stable").tolist():
        row = int(np.where(room_R >= tokens_N[sample], weight_R, np.inf).argmin())
        if room_R[row] < tokens_N[sample]:
            return None
        rows[row].append(sample)
        room_R[row] -= tokens_N[sample]
        weight_R[row] += weight_N[sample]
    return [sorted(row) for row in rows]
