"""The order of streamed records: blocks in a seeded permutation, rows shuffled within a window of blocks.

An epoch of a pool is a permutation of its blocks, cut into windows of about equally many bytes; the rows of a window
are permuted. The order is a function of files, seed and epoch. It has no index: how many rows a window has is known
once it has been read, so that a place is told by the window and the rows of it that have been used.

Several pools are mixed by weight: sample n comes from the pool that lacks most of its share of n + 1 samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm

import numpy as np

from ds_moe.data.blocks import Blocks, RowBlock
from ds_moe.errors import UserError

BLOCKS, ROWS = 1, 2  # what a generator is for, in its seed: one that ends in zeros equals a shorter one


@dataclass(frozen=True)
class Row:
    """One record of a block, not parsed yet."""

    block: RowBlock
    number: int
    source: int

    @property
    def where(self) -> str:
        return self.block.where(self.number)

    @property
    def length(self) -> int:
        """Its bytes."""
        return self.block.length(self.number)


class Window:
    """The rows of some neighbours in the order of blocks, permuted."""

    def __init__(self, blocks: Blocks, chosen: Sequence[int], shuffled_by: Sequence[int] | None) -> None:
        self._blocks = [blocks.read(block) for block in chosen]
        self._sources = [blocks.source(block) for block in chosen]
        self._ends = np.cumsum([0, *map(len, self._blocks)])[1:]
        rows = sum(map(len, self._blocks))
        self._order = np.arange(rows, dtype=np.int32)
        if shuffled_by is not None:
            np.random.default_rng(shuffled_by).shuffle(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> Row:
        row = int(self._order[place])
        block = int(np.searchsorted(self._ends, row, side="right"))
        before = int(self._ends[block - 1]) if block else 0
        return Row(self._blocks[block], row - before, self._sources[block])


class Pool:
    """Blocks that are dealt out together, epoch after epoch.

    Args:
        chosen: their numbers in `blocks`.
        window: about so many bytes are shuffled together, and held in memory.
    """

    def __init__(self, blocks: Blocks, chosen: np.ndarray, window: int, seed: Sequence[int], shuffle: bool) -> None:
        self._all, self._chosen, self._window = blocks, chosen, window
        self._seed, self._shuffle = tuple(seed), shuffle
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_order": None}  # a loading process makes it faster than it would be given it

    @property
    def bytes(self) -> int:
        """Of all blocks."""
        return int(self._all.sizes[self._chosen].sum())

    def windows(self, epoch: int) -> int:
        """The number of windows of an epoch, at least one."""
        return len(self._epoch(epoch)[1]) - 1

    def read(self, epoch: int, window: int) -> Window:
        blocks, first = self._epoch(epoch)
        chosen = blocks[first[window] : first[window + 1]].tolist()
        return Window(self._all, chosen, (*self._seed, ROWS, epoch, window) if self._shuffle else None)

    def first_file(self) -> str:
        """The name of the one that the first epoch begins with."""
        return self._all.read(self.first_block(0)).file.name

    def first_block(self, epoch: int) -> int:
        """The number of the block that an epoch begins with."""
        return int(self._epoch(epoch)[0][0])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(its blocks in their order, the first of each window and their number)."""
        if self._order is None or self._order[0] != epoch:
            blocks = self._chosen.astype(np.int32)
            if self._shuffle:
                np.random.default_rng([*self._seed, BLOCKS, epoch]).shuffle(blocks)
            sizes = self._all.sizes[blocks]
            window_of = (np.cumsum(sizes) - sizes) // self._window
            first = np.flatnonzero(np.diff(window_of, prepend=-1))
            self._order = epoch, blocks, np.append(first, len(blocks))
        return self._order[1:]


@dataclass(frozen=True)
class PoolPlace:
    """How far a pool has been used.

    Attributes:
        epoch: complete passes over it.
        window: of this epoch.
        row: rows of this window that have been used.
        samples: rows that have been used since the very first.
    """

    epoch: int = 0
    window: int = 0
    row: int = 0
    samples: int = 0


class _Reader:
    """The rows of one pool from a place on, endlessly."""

    def __init__(self, pool: Pool, place: PoolPlace) -> None:
        self._pool, self.place = pool, place
        self._read: Window | None = None
        self._rows_seen = place.samples > 0  # whether any window has had one

    def take(self, count: int) -> list[Row]:
        """The next `count` rows."""
        found = []
        while len(found) < count:
            window, place = self._window(), self.place
            some = min(count - len(found), len(window) - place.row)
            found += [window[row] for row in range(place.row, place.row + some)]
            self._advance(some)
        return found

    def skip(self, count: int) -> None:
        while count:
            some = min(count, len(self._window()) - self.place.row)
            self._advance(some)
            count -= some

    def _window(self) -> Window:
        """That of the place, which has a row left; the place is moved on to one that has."""
        while True:
            windows = self._pool.windows(self.place.epoch)
            if self._read is None and self.place.window < windows:
                self._read = self._pool.read(self.place.epoch, self.place.window)
            if self._read is None or self.place.row > len(self._read):
                place, rows = self.place, len(self._read) if self._read else 0
                there = f"an epoch has {windows} windows, this one {rows} rows"
                raise UserError(
                    f"data.train: the checkpoint is at row {place.row} of window {place.window}, and {there}: a file "
                    "has changed (restore it, or start anew in another train.output_dir)"
                )
            if self.place.row < len(self._read):
                self._rows_seen = True
                return self._read
            self._read = None  # freed before the next one is read
            epoch, window = self.place.epoch, self.place.window + 1
            if window == windows:
                if not self._rows_seen:
                    text = f"data.train: no file has a record, from {self._pool.first_file()} on"
                    raise UserError(f"{text} (all lines are blank)")
                epoch, window = epoch + 1, 0
            self.place = replace(self.place, epoch=epoch, window=window, row=0)

    def _advance(self, rows: int) -> None:
        place = self.place
        self.place = replace(place, row=place.row + rows, samples=place.samples + rows)


class Interleaving:
    """Samples of several pools from their places on, endlessly, by weight.

    Args:
        weights: a positive number for each pool.
    """

    def __init__(self, pools: Sequence[Pool], weights: Sequence[float], places: Sequence[PoolPlace]) -> None:
        self._readers = [_Reader(pool, place) for pool, place in zip(pools, places, strict=True)]
        self._weights = whole_numbers(weights)

    @property
    def places(self) -> list[PoolPlace]:
        return [reader.place for reader in self._readers]

    def take(self, count: int) -> list[Row]:
        """The next `count` samples in their order."""
        drawn = self._draw(count)
        rows = [iter(reader.take(drawn.count(pool))) for pool, reader in enumerate(self._readers)]
        return [next(rows[pool]) for pool in drawn]

    def skip(self, count: int) -> None:
        drawn = self._draw(count)
        for pool, reader in enumerate(self._readers):
            reader.skip(drawn.count(pool))

    def _draw(self, count: int) -> list[int]:
        """The pool of each of the next samples."""
        if len(self._readers) == 1:
            return [0] * count
        return draws(self._weights, [reader.place.samples for reader in self._readers], count)


def draws(weights: Sequence[int], samples: Sequence[int], count: int) -> list[int]:
    """Which pool each of the next `count` samples comes from, after so many `samples` of each.

    The pool that lacks most of its share is next, the first one of equals, in whole numbers: no pool is ever ahead of
    its share by a whole sample, and after as many samples as the weights add up to each has had exactly its share.
    """
    total, number, drawn = sum(weights), sum(samples), []
    lacks = [weight * number - total * taken for weight, taken in zip(weights, samples, strict=True)]
    for _ in range(count):
        lacks = [lack + weight for lack, weight in zip(lacks, weights, strict=True)]
        pool = max(range(len(lacks)), key=lacks.__getitem__)
        lacks[pool] -= total
        drawn.append(pool)
    return drawn


def whole_numbers(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the ratio of decimal numbers, exactly as they are written."""
    exact = [Fraction(str(weight)) for weight in weights]
    common = lcm(*(one.denominator for one in exact))
    whole = [int(one * common) for one in exact]
    return [one // int(np.gcd.reduce(whole)) for one in whole]
