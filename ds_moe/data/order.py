"""The order of the data: a function of seed, epoch, data and global batch size, never of ranks or workers.

An epoch is a permutation of the records, cut into global batches. Within a global batch samples are sorted by length,
and neighbours go to the ranks of the same micro-step, so that little is padded and no rank waits for another. Sorting
never crosses global batches: each optimizer step stays an unbiased draw from the data.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ds_moe.data.sources.mixture import Mixture, mixed

FILLER = -1  # index of no record; fills up the last global batch of an epoch
Rows = list[list[list[int]]]  # of a step: [micro-step][rank] -> indices of records


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `count` records, the same on every rank and in every worker."""
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class EpochOrder:
    """Which records make up which optimizer step, whatever the number of ranks.

    An epoch is every record once, or what the `mixture` of several sources says.
    """

    lengths: np.ndarray  # (records,) estimated tokens
    global_batch_size: int
    seed: int
    shuffle: bool
    length_grouping: bool
    mixture: Mixture | None = None

    @property
    def records_per_epoch(self) -> int:
        return len(self.lengths) if self.mixture is None else self.mixture.records

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.records_per_epoch // self.global_batch_size)

    def epoch(self, number: int) -> np.ndarray:
        """(records of an epoch,) int64: indices of the records in the order of an epoch."""
        if self.mixture is not None:
            return mixed(self.mixture, self.seed, number, self.shuffle)
        count = len(self.lengths)
        return epoch_order(count, self.seed, number) if self.shuffle else np.arange(count)

    def global_batch(self, position: int) -> list[int]:
        """The records of a step, longest first, then FILLERs. `position` counts steps from the first one of the run."""
        epoch, step = divmod(position, self.steps_per_epoch)
        chosen = self.epoch(epoch)[step * self.global_batch_size : (step + 1) * self.global_batch_size]
        if self.length_grouping:
            chosen = chosen[np.argsort(-self.lengths[chosen], kind="stable")]
        return chosen.tolist() + [FILLER] * (self.global_batch_size - len(chosen))


@dataclass(frozen=True)
class PaddedRows:
    """Micro-batches of equally many samples, whatever their lengths: neighbours in length go to the same micro-step."""

    order: EpochOrder
    micro_batch_size: int
    world_size: int

    def of_step(self, position: int) -> Rows:
        """What each rank takes in each micro-step; FILLERs at the end of an epoch."""
        return deal(self.order.global_batch(position), self.micro_batch_size, self.world_size)


def deal(indices: list[int], size: int, world_size: int) -> Rows:
    """Micro-batches of `size` neighbours for each of the ranks; `size` x `world_size` divides the number of indices."""
    micro_batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    return [micro_batches[start : start + world_size] for start in range(0, len(micro_batches), world_size)]
