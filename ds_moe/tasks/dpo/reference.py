"""Log-probs of pairs under a model, and the reference that a policy is compared with: the base under LoRA."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import deepspeed
import torch
from torch import Tensor

from ds_moe.config.rules.dpo import replays_experts
from ds_moe.data.batch import NO_LOSS
from ds_moe.errors import UserError
from ds_moe.models.head import at_labels, targets_of
from ds_moe.models.lora import without_updates
from ds_moe.moe.routers import Router
from ds_moe.replay.record import RoutingRecorder
from ds_moe.tasks.dpo.pairs import PairBatch
from ds_moe.tasks.task import TrainingParts


class PairReference(Protocol):
    """Gives pairs the log-probs of both answers under the model that the policy must stay near."""

    def added_to(self, batch: PairBatch, split: str) -> PairBatch:
        """The micro-batch with `reference_P2` (collective). `split` is "train", or "held-out"."""
        ...


def pair_logprobs(engine: deepspeed.DeepSpeedEngine, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """(P, 2) fp64 log-probs of both answers, with grad, and (P, 2) int64 how many tokens each has (collective)."""
    found = at_labels(engine, batch.inputs, batch.labels).logits
    sequence_N = batch.sequence_of_token[targets_of(batch.labels) != NO_LOSS]
    logprob_B = found.new_zeros(batch.samples, dtype=torch.float64).index_add(0, sequence_N, found.double())
    return logprob_B.view(-1, 2), torch.bincount(sequence_N, minlength=batch.samples).view(-1, 2)


@torch.no_grad()
def scored(engine: deepspeed.DeepSpeedEngine, batch: PairBatch) -> Tensor:
    """(P, 2) fp64 log-probs under the engine's model, as an evaluation computes them: no token is counted, no loss of
    a balancer is made (collective)."""
    engine.eval()
    logprob_P2, _ = pair_logprobs(engine, batch)
    engine.train()
    return logprob_P2


class BaseReference:
    """The model without its low-rank updates, in one more forward of every micro-batch.

    With experts whose routing can be replayed it also says which of them it used.
    """

    def __init__(self, parts: TrainingParts) -> None:
        self._engine, self._device = parts.engine, parts.topology.device
        self.replays = parts.config.dpo.replay_reference
        known = all(isinstance(layer.gate, Router) for layer in parts.layers)
        self.records = bool(parts.layers) and known and replays_experts(parts.config) is None
        if self.replays and not known:
            text = "dpo.replay_reference needs routers that can repeat a choice; this model keeps its own"
            raise UserError(f"{text}, {type(parts.layers[0].gate).__name__}: set it to false")

    def added_to(self, batch: PairBatch, split: str) -> PairBatch:
        moved = batch.to(self._device)
        with without_updates(self._engine.module):
            if not self.records:
                return replace(batch, reference_P2=scored(self._engine, moved).cpu())
            with RoutingRecorder(self._engine.module) as recorder:
                logprob_P2 = scored(self._engine, moved).cpu()
        [ids_TLK] = recorder.take()
        routing = ids_TLK.unflatten(0, batch.labels.shape).cpu()
        inputs = {**batch.inputs, "routing": routing} if self.replays else batch.inputs
        return replace(batch, inputs=inputs, reference_P2=logprob_P2, reference_routing=routing)
