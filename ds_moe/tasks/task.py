"""What a run minimises: the loop is the same for every task, the loss of a micro-batch is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from ds_moe.monitor import EvalReport
from ds_moe.tasks.answers import Answering, evaluate

if TYPE_CHECKING:
    from ds_moe.training.run import Run

Batch = dict[str, Tensor]
DEFAULT_NEW_TOKENS = 16


class Supervised:
    """The task that others derive from (`ds_moe.tasks.rl.task.PolicyOptimization`): imitate the labelled tokens.

    Cross entropy, the mean over the tokens of the global batch.
    """

    at_boundary = True  # whether a checkpoint may be taken after the step that was last begun
    scoring_s = 0.0  # of the last `next` of `steps`, seconds that were no wait for data

    def steps(self, run: Run) -> Iterator[list[Batch]]:
        """Micro-batches of each optimizer step, endless."""
        return iter(run.stream)

    def weight(self, batch: Batch) -> Tensor:
        """What the micro-batch counts in the mean over the global batch, an integer scalar."""
        return (batch["labels"][:, 1:] != -100).sum()

    def loss(self, run: Run, batch: Batch, share: float) -> Tensor:
        """The micro-batch's loss, with grad: a sum divided by `share`, the global count over ranks x accumulation."""
        return run.engine(**batch, use_cache=False, num_items_in_batch=share).loss

    def metrics(self, run: Run) -> dict[str, float]:
        """What else the optimizer step is reported by, over all ranks (collective)."""
        return {}

    def evaluate(self, run: Run, limit: int | None, each_batch: Callable[[], None]) -> EvalReport:
        """On `limit` held-out samples, or all of them (collective). `each_batch` is called before every batch."""
        config, answering = run.config.train, None
        if config.eval_generate:
            answering = Answering(run.processor, config.max_new_tokens or DEFAULT_NEW_TOKENS)
        shown = run.config.monitor.sample_images
        return evaluate(
            run.engine, run.eval_set, answering, step=run.step, limit=limit, shown=shown, each_batch=each_batch
        )
