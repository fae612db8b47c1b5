"""How far a run has come: what a checkpoint saves beside tensors, apart from the position in the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass
class Figures:
    """What `result.json` and the closing table report of a run so far; None for what is not known yet.

    In JSON, the task's own figures have the task's name as key, and unknown figures are left out.
    """

    step: int | None = None
    loss: float | None = None  # training loss of the last step
    tokens_per_s: float | None = None
    aux_loss: float | None = None
    ep_sent_bytes: float | None = None  # that a rank sent to other ranks' experts in the last step, mean over ranks
    max_vio: float | None = None  # load of the busiest expert over the mean load, less 1
    eval_loss: float | None = None
    accuracy: dict[str, float] | None = None  # by kind of record, and "mean"
    checkpoint: str | None = None  # the newest one's folder
    task: dict[str, float] | None = None  # means over the steps of this process

    def as_json(self, task: str) -> dict[str, object]:
        """The known figures of a run of this task."""
        return {task if name == "task" else name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_json(cls, saved: Mapping[str, object], task: str) -> Figures:
        """The inverse of `as_json`; figures of other tasks are left out."""
        own = {one.name: saved.get(one.name) for one in fields(cls)}
        return cls(**(own | {"task": saved.get(task)}))


@dataclass
class Progress:
    """The step that a run has reached, and what a resumed run needs to know with it."""

    total_steps: int  # not saved: it follows from the run file and the data
    step: int = 0  # optimizer steps done
    file_from: int = 0  # the step at which the run began its data file; a run with rollouts reads one after the other
    evaluation_due: bool = False  # whether an evaluation must follow the step, and has not run yet
    best_loss: float | None = None  # the lowest held-out loss so far, with `train.patience`
    best: Figures | None = None  # of the run, after the evaluation that had it
    best_checkpoint: str | None = None  # name of the folder with its weights; empty: in another run's; None: none yet
    waited: int = 0  # evaluations since then
    figures: Figures = field(default_factory=Figures)

    @property
    def last(self) -> bool:
        """Whether the last step is done."""
        return self.step == self.total_steps

    def as_json(self, task: str) -> dict[str, object]:
        """Keys of a checkpoint's `state.json`; there are others."""
        return {
            "step": self.step,
            "file_from": self.file_from,
            "result": self.figures.as_json(task),
            "evaluation_due": self.evaluation_due,
            "best_loss": self.best_loss,
        } | ({} if self.best is None else self._of_best(self.best, task))

    def _of_best(self, best: Figures, task: str) -> dict[str, object]:
        return {"best": best.as_json(task), "best_checkpoint": self.best_checkpoint, "waited": self.waited}

    def resume(self, saved: Mapping[str, object], task: str) -> None:
        """Take over what a checkpoint's state holds. Older versions saved fewer keys."""
        self.step = saved["step"]
        self.file_from = saved.get("file_from", 0)
        self.figures = Figures.from_json(saved["result"], task)
        self.evaluation_due = saved.get("evaluation_due", False)
        self.best_loss, self.waited = saved.get("best_loss"), saved.get("waited", 0)
        self.best_checkpoint, best = saved.get("best_checkpoint"), saved.get("best")
        self.best = None if best is None else Figures.from_json(best, task)
