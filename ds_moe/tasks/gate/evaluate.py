"""Asks a gate about every record of a held-out set, from the prompt alone, as it would be asked in serving."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ds_moe.data.encode import NO_LOSS
from ds_moe.data.eval_set import EvalSet
from ds_moe.distributed import over_ranks, raise_together
from ds_moe.monitor.reports import ShownSample
from ds_moe.tasks.answers import accuracy_by_kind
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


class _Row(NamedTuple):
    """What a survey has found of one record."""

    probabilities_K: np.ndarray
    label: int
    text_D: np.ndarray
    vision_D: np.ndarray
    where: str
    kind: str | None


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
    loss, rows, samples = 0.0, [], []
    for batch in eval_set.batches(limit, padded=True):  # requests alone, as the gate meets them when it serves
        each_batch()
        [prompt] = batch.prompts()
        decision = model(**prompt.to(inner.device).inputs, gate_only=True)
        mask_BS = inner.counted_BS
        probabilities_BK = per_sample(decision.logits, mask_BS).cpu()
        labels_B = batch.batch.adapter_B
        loss += float(gate_loss(decision, labels_B.to(decision.logits.device), mask_BS))
        text_BD, vision_BD = inner.features.text_BD.cpu().numpy(), inner.features.vision_BD.cpu().numpy()
        for index in [at for at, weight in enumerate(batch.weights) if weight]:
            sample, label = batch.samples[index], int(labels_B[index])
            seen = text_BD[index], vision_BD[index]
            rows.append(_Row(probabilities_BK[index].numpy(), label, *seen, sample.where, sample.kind))
            if len(samples) < shown and label != NO_LOSS:
                predicted = names[int(probabilities_BK[index].argmax())]
                samples.append(ShownSample(sample.first_image(), sample.last_question(), names[label], predicted))
    model.train(was_training)
    raise_together(eval_set.error)
    losses, ranks = zip(*over_ranks((loss, rows)), strict=True)
    probabilities, labels, text, vision, where, kinds = zip(*chain(*ranks), strict=True)
    probabilities_NK, text_ND, vision_ND = map(np.stack, (probabilities, text, vision))
    found = Survey(names, probabilities_NK, np.array(labels), text_ND, vision_ND, list(where), samples=samples)
    if found.labelled.any():
        found.loss = sum(losses) / int(found.labelled.sum())
        right_N = probabilities_NK.argmax(1) == found.labels_N
        asked = Counter(kind or "all" for kind, labelled in zip(kinds, found.labelled, strict=True) if labelled)
        right = Counter(kind or "all" for kind, one in zip(kinds, right_N, strict=True) if one)
        found.accuracy = accuracy_by_kind(asked, right)
    return found


def per_sample(logits: Tensor, mask_BS: Tensor | None) -> Tensor:
    """(B, K) probabilities of each sample, averaged over layers, or over the tokens of the mask."""
    probabilities = logits.float().softmax(-1)
    if probabilities.dim() == 2:
        return probabilities
    if mask_BS is None:
        return probabilities.mean(1)
    kept = probabilities * mask_BS.unsqueeze(-1)
    return kept.sum(1) / mask_BS.sum(1, keepdim=True).clamp(min=1)
