"""`train.patience`: end a run when its held-out loss no longer falls; the newest checkpoint is then the best one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class EarlyStopping:
    """Counts evaluations without a better loss."""

    patience: int
    best: float = math.inf
    waited: int = 0
    result: dict[str, Any] = field(default_factory=dict)  # of the run, at its best evaluation

    def note(self, loss: float, result: dict[str, Any]) -> bool:
        """Whether this evaluation is the best so far."""
        better = loss < self.best
        if better:
            self.best, self.waited, self.result = loss, 0, dict(result)
        else:
            self.waited += 1
        return better

    @property
    def exhausted(self) -> bool:
        return self.waited >= self.patience
