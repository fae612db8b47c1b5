"""`task: gate`: the stages in which a gate over adapters learns.

supervised   from labels that name the adapter of a request; the language model does not run
end_to_end   from the loss of the answers, through frozen adapters, with an entropy term and a pull to the last stage
joint        the same, while the adapters learn too, with a learning rate of their own
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe.checkpoint.progress import Progress
from ds_moe.data.batch import NO_LOSS, Batch
from ds_moe.data.sources.mixture import Mixture
from ds_moe.monitor.reports import EvalReport
from ds_moe.tasks.answers import Answered
from ds_moe.tasks.gate.evaluate import Survey, per_sample, survey
from ds_moe.tasks.gate.network import GateDecision, divergence, entropy, gate_loss
from ds_moe.tasks.gate.records import RoutedBatch
from ds_moe.tasks.gate.scores import RoutingScores
from ds_moe.tasks.task import Task, TrainingParts


class GateTask(Task):
    """The task of a run with `task: gate`. The engine's model must be gated, see `model.install_gate`."""

    def __init__(self, parts: TrainingParts) -> None:
        super().__init__(parts)
        self.config = parts.config.gate
        self.supervised = self.config.stage == "supervised"
        self.names: list[str] = parts.engine.module.adapter_bank.names
        self.class_weights: Tensor | None = None
        if self.config.class_weights == "balanced":
            rows = parts.stream.rows
            mixture = None if rows is None else rows.order.mixture
            self.class_weights = balanced(self.names, parts.stream.remembered, mixture)
        self._sums: dict[str, Tensor] = {}
        self._share = 1.0  # real samples of a micro-batch of the step that was last begun, mean over ranks

    def steps(self, progress: Progress) -> Iterator[list[Batch]]:
        """The micro-batches of each step. The first step's also set the scale of the features of a new gate."""
        stream = super().steps(progress)
        if progress.step == 0 and self.config.start is None:
            first = next(stream)
            self._set_scale(first)
            stream = chain([first], stream)
        for micro_batches in stream:
            if not self.supervised:
                self._count(micro_batches)
            yield micro_batches

    def _count(self, micro_batches: list[Batch]) -> None:
        """Note the real samples of a step: the last one of an epoch may have few (collective)."""
        topology = self.parts.topology
        samples = torch.tensor(sum(int(batch.real_B.sum()) for batch in micro_batches), device=topology.device)
        dist.all_reduce(samples)
        self._share = max(samples.item(), 1) / (topology.world_size * len(micro_batches))

    @torch.no_grad()
    def _set_scale(self, micro_batches: list[Batch]) -> None:
        """Set mean and deviation of the features from the real samples of all ranks (collective)."""
        engine, device = self.parts.engine, self.parts.topology.device
        model, router = engine.module, engine.module.adapter_gate
        scales = (router.text_scale, router.vision_scale)
        sums = [torch.zeros(1 + 2 * len(scale.mean), device=device) for scale in scales]
        for batch in micro_batches:
            batch = batch.to(device)
            real_B = batch.real_B
            engine(**batch.with_labels, gate_only=True)
            seen = model.features
            if seen.token_RSD is None:
                text = seen.text_BD[real_B]
            else:
                text = seen.token_RSD[seen.mask_RS & batch.real_of_token]
            for row, values in zip(sums, (text.float(), seen.vision_BD[real_B & seen.present_B]), strict=True):
                row += torch.cat([row.new_tensor([len(values)]), values.sum(0), values.square().sum(0)])
        for scale, row in zip(scales, sums, strict=True):
            dist.all_reduce(row)
            scale.fit(row[0], *row[1:].chunk(2))

    def weight(self, batch: RoutedBatch) -> Tensor:
        return (batch.adapter_B != NO_LOSS).sum() if self.supervised else super().weight(batch)

    def loss(self, batch: RoutedBatch, share: float) -> Tensor:
        labels_B, real_B = batch.adapter_B, batch.real_B
        model = self.parts.engine.module
        if self.supervised:
            decision = self.parts.engine(**batch.with_labels, gate_only=True)
            mask_BS = model.counted_BS
            loss = gate_loss(decision, labels_B, mask_BS, self.class_weights) / share
        else:
            loss = super().loss(batch, share)
            decision, mask_BS = model.decision, model.counted_BS
            loss = loss + self._regularisers(decision, mask_BS, real_B)
        self._note(decision, labels_B, mask_BS, real_B)
        return loss

    def _regularisers(self, decision: GateDecision, mask_BS: Tensor | None, real_B: Tensor) -> Tensor:
        """The entropy term and the pull to the reference: sums over real samples, divided by the mean number of samples
        of a micro-batch, because the losses are averaged over ranks and micro-batches."""
        total = self.config.entropy_weight * (entropy(decision.weights, mask_BS) * real_B).sum() / self._share
        reference = self.parts.engine.module.reference_logits
        if reference is not None:
            away_B = divergence(decision.logits, reference, mask_BS)
            total = total + self.config.kl_weight * (away_B * real_B).sum() / self._share
            self._add("kl_to_supervised", away_B.detach()[real_B])
        return total

    def _note(self, decision: GateDecision, labels_B: Tensor, mask_BS: Tensor | None, real_B: Tensor) -> None:
        self._add("entropy", entropy(decision.weights.detach(), mask_BS)[real_B])
        known_B = labels_B != NO_LOSS
        chosen_B = per_sample(decision.logits.detach(), mask_BS).argmax(-1)
        self._add("routing_accuracy", (chosen_B == labels_B)[known_B])

    def _add(self, name: str, values: Tensor) -> None:
        both = torch.stack([values.float().sum(), values.new_ones(values.shape, dtype=torch.float32).sum()])
        self._sums[name] = self._sums.get(name, torch.zeros_like(both)) + both

    def metrics(self, progress: Progress) -> dict[str, float]:
        sums, self._sums = self._sums, {}
        totals = torch.stack(list(sums.values()))
        dist.all_reduce(totals)
        return {name: (total / count).item() for name, (total, count) in zip(sums, totals, strict=True) if count > 0}

    def evaluate(
        self,
        step: int,
        limit: int | None,
        each_batch: Callable[[], None],
        note: Callable[[list[Answered]], None] = lambda answered: None,
    ) -> EvalReport:
        """In stage supervised: held-out loss and accuracy of routing. Later: those of answers, plus the routing's."""
        parts = self.parts
        shown = parts.config.monitor.sample_images
        found = survey(parts.engine, parts.eval_set, self.names, limit, shown=shown, each_batch=each_batch)
        if self.supervised:
            report = EvalReport(step, found.loss, found.accuracy, found.samples)
        else:
            report = super().evaluate(step, limit, each_batch, note)
        if (scores := found.scores()) is not None:
            report.scalars = {"eval/routing_accuracy": scores.accuracy, "eval/routing_ece": scores.ece}
            report.pictures = pictures(scores, found)
        return report


def pictures(scores: RoutingScores, found: Survey) -> dict[str, Callable[[], np.ndarray]]:
    """Functions that draw the pictures of an evaluation, by TensorBoard tag."""
    from ds_moe.tasks.gate.figures import confusion_figure, gate_histogram

    return {
        "gate/confusion": lambda: confusion_figure(scores),
        "gate/weights": lambda: gate_histogram(found.probabilities_NK, found.names),
    }


def balanced(names: list[str], labels: Sequence[object], mixture: Mixture | None = None) -> Tensor:
    """Class weights (K,): N / (K n_k), so that labelled samples have mean weight 1; 0 for an adapter without any.

    Args:
        labels: the adapter that each record names, None for none.
        mixture: how often each is drawn; None: all alike.
    """
    times_R = np.ones(len(labels)) if mixture is None else mixture.times
    named = np.array(labels, dtype=object)
    counts_K = torch.tensor([times_R[named == name].sum() for name in names], dtype=torch.float32)
    return torch.where(counts_K > 0, counts_K.sum() / (len(names) * counts_K), 0.0)
