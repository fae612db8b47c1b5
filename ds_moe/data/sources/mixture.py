"""How many records of each source an epoch has, and in which order: a function of the sizes, the shares and the seed.

Nothing is drawn by chance but the order within a source, so that shares are met and not only expected:

- An epoch has exactly `quotas[s]` records of source s.
- The records of source s are drawn in passes over all of them, each in an order of its own. A pass goes on in the next
  epoch: at any point of a run, two records of one source have been drawn equally often, or one of them once more.
- Any p records from the beginning of an epoch have p x quotas[s] / sum(quotas) of source s to within
  1/2 + share x (S - 2) / 2, with S sources: within half a record for two sources. For the records of one step it is
  twice that. Record k of q stands at (k + 1/2) / q of the epoch; sums of what is rounded so differ by no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor

import numpy as np

from ds_moe.config.sections import DataConfig, sources_of
from ds_moe.data.record_kind import Records
from ds_moe.errors import UserError, shown

MOST_RECORDS = 2**31  # of an epoch


@dataclass(frozen=True)
class Mixture:
    """Attributes:
    sizes: records of each source.
    quotas: those that an epoch takes of it; above its size, some come again.
    """

    sizes: tuple[int, ...]
    quotas: tuple[int, ...]

    @property
    def records(self) -> int:
        """Of an epoch."""
        return sum(self.quotas)

    @property
    def times(self) -> np.ndarray:
        """(all records,) float64: how often an epoch takes each, on average over epochs; those of the first source come
        first."""
        return np.repeat(np.divide(self.quotas, self.sizes), self.sizes)

    def described(self, names: Sequence[str]) -> str:
        """What an epoch has of each source, in a line."""
        parts = zip(names, self.sizes, self.quotas, strict=True)
        return ", ".join(f"{name} {quota:,} ({quota / self.records:.1%}; has {size:,})" for name, size, quota in parts)


@lru_cache(maxsize=2)
def mixed(mixture: Mixture, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """(records of an epoch,) int64: indices into all records, those of the first source first."""
    first, drawn = 0, []
    for source, (size, quota) in enumerate(zip(mixture.sizes, mixture.quotas, strict=True)):
        drawn.append(first + _drawn(size, quota, [seed, source], epoch, shuffle))
        first += size
    place = np.concatenate([(2 * np.arange(quota) + 1) / (2 * quota) for quota in mixture.quotas])
    return np.concatenate(drawn)[np.argsort(place, kind="stable")]


def _drawn(size: int, quota: int, seed: list[int], epoch: int, shuffle: bool) -> np.ndarray:
    """What an epoch takes of one source: records `epoch * quota` and following of endless passes over it."""
    first = epoch * quota
    passes = range(first // size, (first + quota - 1) // size + 1)
    every = [np.random.default_rng([*seed, one]).permutation(size) if shuffle else np.arange(size) for one in passes]
    start = first - passes[0] * size
    return np.concatenate(every)[start : start + quota]


def mixture_of(data: DataConfig, records: Records) -> Mixture | None:
    """The mixture of a run's sources; None: there is one source, of which an epoch takes every record once.

    Raises:
        UserError: an epoch would take no record of a source.
    """
    given = sources_of(data.train)
    sizes = [facts.records for facts in records.sources] or [len(records)]
    if len(sizes) != len(given) or (len(given) == 1 and given[0].epochs is None):
        return None
    if any(source.epochs is not None for source in given):
        quotas = [
            round_half_up(Fraction(str(source.epochs or 1)) * size) for source, size in zip(given, sizes, strict=True)
        ]
    else:
        shares = _shares(data, sizes)
        quotas = whole_numbers(_records(data.mixture.epoch, sizes, shares), shares)
    if sum(quotas) > MOST_RECORDS:
        text = f"data: an epoch would have {sum(quotas):,} records, of which at most {MOST_RECORDS:,} are put in order"
        raise UserError(f"{text} (set data.mixture.epoch to all or shortest, or give smaller sources more weight)")
    if 0 in quotas:
        source = given[quotas.index(0)].path
        text = f"data: an epoch of {sum(quotas)} records has none of {shown(source)}"
        raise UserError(f"{text} (give it a larger share, or the epoch more records: data.mixture.epoch)")
    return Mixture(tuple(sizes), tuple(quotas))


def _shares(data: DataConfig, sizes: Sequence[int]) -> list[Fraction]:
    """The share of each source, which add up to one."""
    given, temperature = sources_of(data.train), data.mixture.temperature
    if temperature is not None:
        parts = [Fraction(size ** (1 / temperature)) for size in sizes]
    elif any(source.weight is not None for source in given):
        parts = [Fraction(str(source.weight or 1)) for source in given]
    else:
        parts = [Fraction(size) for size in sizes]
    return [part / sum(parts) for part in parts]


def _records(epoch: str, sizes: Sequence[int], shares: Sequence[Fraction]) -> int:
    """Of an epoch: as many as there are, or as many as use the first source, or all of them, up."""
    whole = [size / share for size, share in zip(sizes, shares, strict=True)]
    return {"all": sum(sizes), "shortest": floor(min(whole)), "longest": ceil(max(whole))}[epoch]


def whole_numbers(total: int, shares: Sequence[Fraction]) -> list[int]:
    """`total` by shares that add up to one, in whole numbers: largest remainders (Hamilton), first ones first."""
    exact = [total * share for share in shares]
    found = [floor(one) for one in exact]
    by_rest = sorted(range(len(exact)), key=lambda number: found[number] - exact[number])
    for number in by_rest[: total - sum(found)]:
        found[number] += 1
    return found


def round_half_up(value: Fraction) -> int:
    return floor(value + Fraction(1, 2))
