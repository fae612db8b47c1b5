"""`train.patience`: end a run when its held-out loss no longer falls; the newest checkpoint is then the best one."""

import math
from dataclasses import dataclass, field, replace

from ds_moe.checkpoint.progress import Figures


@dataclass
class EarlyStopping:
    """Counts evaluations without a better loss."""

    patience: int
    best: float = math.inf
    waited: int = 0
    figures: Figures = field(default_factory=Figures)  # of the run, at its best evaluation

    def note(self, loss: float, figures: Figures) -> bool:
        """Whether this evaluation is the best so far."""
        better = loss < self.best
        if better:
            self.best, self.waited, self.figures = loss, 0, replace(figures)
        else:
            self.waited += 1
        return better

    @property
    def exhausted(self) -> bool:
        return self.waited >= self.patience
