"""Asks a gate about every record of a held-out set, from the prompt alone, as it would be asked in serving."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ds_moe.data.encode import NO_LOSS
from ds_moe.data.eval_set import EvalSet
from ds_moe.distributed import over_ranks, raise_together
from ds_moe.monitor import ShownSample
from ds_moe.tasks.gate.network import gate_loss
from ds_moe.tasks.gate.scores import RoutingScores, routing_scores


@dataclass
class Survey:
    """What the gate has decided for the N records of all ranks."""

    names: list[str]  # of the K adapters
    probabilities_NK: np.ndarray
    labels_N: np.ndarray  # int64; NO_LOSS if a record names no adapter
    text_ND: np.ndarray  # the features that the gate saw
    vision_ND: np.ndarray
    where: list[str]  # file:line
    loss: float = float("nan")  # mean cross entropy of the labelled records
    accuracy: dict[str, float] = field(default_factory=dict)  # by kind of record, and "mean"
    samples: list[ShownSample] = field(default_factory=list)  # of this rank

    @property
    def labelled(self) -> np.ndarray:
        return self.labels_N != NO_LOSS

    def scores(self, train_labels: np.ndarray | None = None) -> RoutingScores | None:
        """The scores over the labelled records; None if there is none."""
        if not self.labelled.any():
            return None
        return routing_scores(
            self.probabilities_NK[self.labelled], self.labels_N[self.labelled], self.names, train_labels
        )


@dataclass
class _Rows:
    """What a survey found on one rank, in the order of its records."""

    probabilities: list[np.ndarray] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    text: list[np.ndarray] = field(default_factory=list)
    vision: list[np.ndarray] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    kinds: list[str | None] = field(default_factory=list)
    loss: float = 0.0

    def extend(self, other: _Rows) -> None:
        self.probabilities += other.probabilities
        self.labels += other.labels
        self.text += other.text
        self.vision += other.vision
        self.where += other.where
        self.kinds += other.kinds
        self.loss += other.loss


@torch.no_grad()
def survey(
    model: nn.Module,
    eval_set: EvalSet,
    names: list[str],
    limit: int | None = None,
    shown: int = 0,
    each_batch: Callable[[], None] = lambda: None,
) -> Survey:
    """Ask the gate about all records; if there are several ranks, each asks about a share of them (collective).

    Args:
        model: a gated model, or the engine around one.
        limit: the number of records to use, over all ranks; None: all.
        shown: how many samples to return, with the right and the predicted adapter.
        each_batch: called before every batch.

    Raises:
        UserError: on every rank, if any rank met a bad record.
    """
    inner, was_training = getattr(model, "module", model), model.training
    model.eval()
    rows, samples = _Rows(), []
    for batch in eval_set.batches(limit):
        each_batch()
        decision = model(**batch.prompt.to(inner.device).inputs, gate_only=True)
        mask_BS = inner.features.mask_BS
        probabilities_BK = per_sample(decision.logits, mask_BS).cpu()
        labels_B = batch.batch.adapter_B
        rows.loss += float(gate_loss(decision, labels_B.to(decision.logits.device), mask_BS))
        text_BD, vision_BD = inner.features.text_BD.cpu().numpy(), inner.features.vision_BD.cpu().numpy()
        for index in [at for at, weight in enumerate(batch.weights) if weight]:
            sample, label = batch.samples[index], int(labels_B[index])
            rows.probabilities.append(probabilities_BK[index].numpy())
            rows.labels.append(label)
            rows.text.append(text_BD[index])
            rows.vision.append(vision_BD[index])
            rows.where.append(sample.where)
            rows.kinds.append(sample.kind)
            if len(samples) < shown and label != NO_LOSS:
                predicted = names[int(probabilities_BK[index].argmax())]
                samples.append(ShownSample(sample.first_image(), sample.last_question(), names[label], predicted))
    model.train(was_training)
    raise_together(eval_set.error)
    return _gathered(over_ranks(rows), names, samples)


def _gathered(ranks: list[_Rows], names: list[str], samples: list[ShownSample]) -> Survey:
    rows = _Rows()
    for one in ranks:
        rows.extend(one)
    labels_N = np.array(rows.labels, dtype=np.int64)
    probabilities_NK, text_ND, vision_ND = map(np.stack, (rows.probabilities, rows.text, rows.vision))
    found = Survey(names, probabilities_NK, labels_N, text_ND, vision_ND, rows.where, samples=samples)
    labelled = int(found.labelled.sum())
    if labelled:
        found.loss = rows.loss / labelled
        found.accuracy = _accuracy(found, rows.kinds)
    return found


def _accuracy(found: Survey, kinds: list[str | None]) -> dict[str, float]:
    hits: dict[str, list[bool]] = defaultdict(list)
    right_N = found.probabilities_NK.argmax(1) == found.labels_N
    for kind, right, labelled in zip(kinds, right_N, found.labelled, strict=True):
        if labelled:
            hits[kind or "all"].append(bool(right))
    accuracy = {kind: sum(rights) / len(rights) for kind, rights in sorted(hits.items())}
    return accuracy | {"mean": sum(accuracy.values()) / len(accuracy)}


def per_sample(logits: Tensor, mask_BS: Tensor | None) -> Tensor:
    """(B, K) probabilities of each sample, averaged over layers, or over the tokens of the mask."""
    probabilities = logits.float().softmax(-1)
    if probabilities.dim() == 2:
        return probabilities
    if mask_BS is None:
        return probabilities.mean(1)
    kept = probabilities * mask_BS.unsqueeze(-1)
    return kept.sum(1) / mask_BS.sum(1, keepdim=True).clamp(min=1)
