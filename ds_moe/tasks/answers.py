"""Held-out loss and the share of right answers, per kind of question.

Of conversations an answer is right that matches exactly; its thought is generated but not compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, PreTrainedModel

from ds_moe.data.batch import Batch
from ds_moe.data.chat import Sample, final_answer
from ds_moe.data.eval_set import EvalBatch, EvalSet
from ds_moe.data.processor import Processor
from ds_moe.data.special_tokens import text_of
from ds_moe.distributed import over_ranks, parallel, raise_together
from ds_moe.engine.whole_weights import evaluation_mode
from ds_moe.models.generation import own_generation_config
from ds_moe.models.head import at_labels
from ds_moe.models.vision import encode_blank, has_vision
from ds_moe.monitor.reports import EvalReport, ShownSample

if TYPE_CHECKING:
    import deepspeed


@dataclass(frozen=True)
class Answering:
    """How answers are generated: greedily, `max_new_tokens` at most; None in its place: only the loss."""

    processor: Processor
    max_new_tokens: int
    content_tokens: Sequence[str] = ()  # special tokens that belong to an answer


@dataclass(frozen=True)
class Answered:
    """What an evaluation has found of one sample."""

    where: str  # file:line of its record
    kind: str | None
    question: str
    answer: str  # the expected one
    prediction: str | None  # the generated one, without its thought; None: only losses are evaluated

    @property
    def right(self) -> bool | None:
        return None if self.prediction is None else self.prediction == self.answer


@dataclass(frozen=True)
class Judged:
    """What is found of one batch on this rank.

    Attributes:
        loss: a sum over what the mean loss is a mean of.
        count: how many of these there are.
        answered: of each sample but fillers.
    """

    loss: float
    count: int
    answered: list[tuple[Answered, Sample]]


def conversations(engine: deepspeed.DeepSpeedEngine, answering: Answering | None) -> Callable[[EvalBatch], Judged]:
    """How `evaluate` judges conversations: by the loss of labelled tokens, and by generated answers."""

    def judged(batch: EvalBatch) -> Judged:
        labelled = batch.batch.to(engine.device)
        loss = at_labels(engine, labelled.inputs, labelled.labels).loss.item()
        return Judged(loss, int(labelled.label_tokens), _answers(engine, batch, answering))

    return judged


@torch.no_grad()
def evaluate(
    engine: deepspeed.DeepSpeedEngine,
    eval_set: EvalSet,
    judged: Callable[[EvalBatch], Judged],
    *,
    step: int,
    limit: int | None = None,
    shown: int = 0,
    each_batch: Callable[[], None] = lambda: None,
    note: Callable[[list[Answered]], None] = lambda answered: None,
) -> EvalReport:
    """Evaluate on all ranks together (collective); every rank returns the same numbers, rank 0 the samples to show.

    Args:
        judged: says what is found of a batch (collective).
        limit: samples to use, over all ranks; None: all.
        shown: how many samples to return with question, answer and prediction.
        each_batch: called before every batch.
        note: called after every batch, with this rank's samples of it.

    Raises:
        UserError: on every rank, when any of them met a bad record.
    """
    loss, count = 0.0, 0
    asked, right = Counter(), Counter()  # answers by kind of question
    samples: list[ShownSample] = []
    with evaluation_mode(engine):
        for batch in eval_set.batches(limit):
            each_batch()
            found = judged(batch)
            loss, count = loss + found.loss, count + found.count
            for one, sample in found.answered:
                if one.prediction is None:
                    continue
                asked[one.kind or "all"] += 1
                right[one.kind or "all"] += bool(one.right)
                if len(samples) < shown:
                    samples.append(ShownSample(sample.first_image(), one.question, one.answer, one.prediction))
            note([one for one, _ in found.answered])
    raise_together(eval_set.error)
    losses, counts, all_asked, all_right = zip(*over_ranks((loss, count, asked, right)), strict=True)
    accuracy = accuracy_by_kind(sum(all_asked, Counter()), sum(all_right, Counter()))
    return EvalReport(step, sum(losses) / max(sum(counts), 1), accuracy, samples)


def _answers(
    engine: deepspeed.DeepSpeedEngine, batch: EvalBatch, answering: Answering | None
) -> list[tuple[Answered, Sample]]:
    """What is found of each sample of a batch but its fillers (collective)."""
    predictions: list[str | None] = [None] * len(batch.samples)
    if answering is not None:
        prompts = (prompt.to(engine.device) for prompt in batch.prompts())
        generated = [text for prompt in prompts for text in generate_answers(engine.module, prompt, answering)]
        predictions = [final_answer(text).strip() for text in generated[: len(batch.samples)]]
    compared = zip(batch.samples, batch.answers, predictions, batch.weights, strict=True)
    return [
        (Answered(sample.where, sample.kind, sample.last_question(), answer, prediction), sample)
        for sample, answer, prediction, weight in compared
        if weight
    ]


def accuracy_by_kind(asked: Counter[str], right: Counter[str]) -> dict[str, float]:
    """The share of right answers to each kind of question, and as "mean" the mean over the kinds."""
    shares = {kind: right[kind] / asked[kind] for kind in sorted(+asked)}
    return shares | {"mean": sum(shares.values()) / len(shares)} if shares else {}


def generate_answers(model: PreTrainedModel, prompt: Batch, answering: Answering) -> list[str]:
    """Greedy answers to left-padded prompts. Ranks keep step until the last one has finished its longest answer."""
    if parallel() and has_vision(model) and "pixel_values" not in prompt.inputs:
        encode_blank(model, prompt.labels.device)  # `generate` encodes the other ranks' images at this point
    own = model.generation_config
    greedy = GenerationConfig(
        max_new_tokens=answering.max_new_tokens,
        do_sample=False,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
    )
    with own_generation_config(model):
        tokens = model.generate(**prompt.inputs, generation_config=greedy, use_cache=True, synced_gpus=parallel())
    answers = tokens[:, prompt.labels.shape[1] :]
    return [text_of(ids, answering.processor, answering.content_tokens).strip() for ids in answers.tolist()]
