"""Several files, or several sources, as one list of records."""

import hashlib
import json
from collections.abc import Sequence
from typing import Generic

import numpy as np

from ds_moe.data.record_kind import Parsed, Records, SourceFacts


class JoinedRecords(Generic[Parsed]):
    """The records of the first part, then those of the next; satisfies `Records`.

    Attributes:
        sources: what is known of each part, where the parts are sources.
    """

    def __init__(self, parts: Sequence[Records[Parsed]], sources: tuple[SourceFacts, ...] = ()):
        self._parts, self.sources = list(parts), sources
        self._ends = np.cumsum([len(part) for part in parts])
        self.record_kind = parts[0].record_kind
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.kinds: tuple[str, ...] = tuple(sorted({kind for part in parts for kind in part.kinds}))
        self.bad = [bad for part in parts for bad in part.bad]
        self.remembered = [one for part in parts for one in part.remembered]
        self.sha256 = hashlib.sha256(json.dumps([part.sha256 for part in parts]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> Parsed:
        part, inside = self._place(index)
        return part.sample(inside)

    def where(self, index: int) -> str:
        part, inside = self._place(index)
        return part.where(inside)

    def _place(self, index: int) -> tuple[Records[Parsed], int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[number], index - (int(self._ends[number - 1]) if number else 0)
