"""What a run minimises: the loop is the same for every task, the loss of a micro-batch is not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import deepspeed
from torch import Tensor

from ds_moe.checkpoint.progress import Progress
from ds_moe.config.run import RunConfig
from ds_moe.data.batch import Batch
from ds_moe.data.eval_set import EvalBatch, EvalSet
from ds_moe.data.processor import Processor
from ds_moe.data.stream import StepStream
from ds_moe.distributed import Topology
from ds_moe.models.convert import moe_layers
from ds_moe.models.head import at_labels
from ds_moe.moe.context import ForwardContext
from ds_moe.moe.layer import MoELayer
from ds_moe.moe.loss_free import LossFreeBalancing, loss_free
from ds_moe.monitor.reports import EvalReport
from ds_moe.tasks.answers import Answered, Answering, Judged, conversations, evaluate

DEFAULT_NEW_TOKENS = 16


@dataclass(frozen=True)
class TrainingParts:
    """What training needs of a run. `optimizer_step` reads the first four; tasks read the others too.

    An evaluation of its own has no `stream`, and an engine without an optimizer.
    """

    config: RunConfig
    topology: Topology
    engine: deepspeed.DeepSpeedEngine
    context: ForwardContext | None  # of the expert layers; None for a dense model
    processor: Processor | None = None
    stream: StepStream | None = None
    eval_set: EvalSet | None = None
    note: Callable[[str], None] = print  # tells the person who runs the job one line
    at: Callable[[str], None] = lambda phase: None  # tells the watchdog what this rank does next
    # As `at`, for a wait of all ranks; raises `Stopped` on every rank when any has got a signal (collective).
    turn: Callable[[str], None] = lambda phase: None

    @cached_property
    def layers(self) -> list[MoELayer]:
        """Empty for a dense model."""
        return moe_layers(self.engine.module)

    @cached_property
    def balancings(self) -> list[LossFreeBalancing]:
        """Those of the layers in whose selection a loss-free bias takes part."""
        return loss_free(self.engine.module)


class Task:
    """Supervised fine-tuning, from which the other tasks derive: imitate the labelled tokens.

    The loss is the cross entropy, a mean over the tokens of the global batch.
    """

    at_boundary = True  # whether a checkpoint may be taken after the step that was last begun
    scoring_s = 0.0  # seconds that the last step spent scoring rather than waiting for data

    def __init__(self, parts: TrainingParts) -> None:
        self.parts = parts

    def steps(self, progress: Progress) -> Iterator[list[Batch]]:
        """Micro-batches of each optimizer step, endless."""
        return iter(self.parts.stream)

    def weight(self, batch: Batch) -> Tensor:
        """What the micro-batch counts in the mean over the global batch, an integer scalar."""
        return batch.label_tokens

    def loss(self, batch: Batch, share: float) -> Tensor:
        """The micro-batch's loss, with grad: a sum divided by `share`, the global count over ranks x accumulation."""
        engine, behind = self.parts.engine, batch.next_label
        return at_labels(engine, batch.inputs, batch.labels, next_R=behind, num_items=share).loss

    def metrics(self, progress: Progress) -> dict[str, float]:
        """What else the optimizer step is reported by, over all ranks (collective)."""
        return {}

    def close(self) -> None:
        """End what was started beside the engine; called once, however the run ends."""

    def closing_rows(self) -> dict[str, str]:
        """What the closing table says of this process's steps beside the figures of the run: name -> value."""
        return {}

    def judges(self) -> Callable[[EvalBatch], Judged]:
        """What is found of each batch of one evaluation."""
        config, answering = self.parts.config.train, None
        if config.eval_generate:
            longest = config.max_new_tokens or DEFAULT_NEW_TOKENS
            answering = Answering(self.parts.processor, longest, self.parts.config.data.content_tokens)
        return conversations(self.parts.engine, answering)

    def evaluate(
        self,
        step: int,
        limit: int | None,
        each_batch: Callable[[], None],
        note: Callable[[list[Answered]], None] = lambda answered: None,
    ) -> EvalReport:
        """On `limit` held-out samples, or all of them, see `answers.evaluate` (collective). `step` is the report's."""
        return evaluate(
            self.parts.engine,
            self.parts.eval_set,
            self.judges(),
            step=step,
            limit=limit,
            shown=self.parts.config.monitor.sample_images,
            each_batch=each_batch,
            note=note,
        )
