"""The MoE layer: route -> dispatch -> experts -> combine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ds_moe.moe.balance import Balancer
from ds_moe.moe.dispatch import AllToAllDispatcher, LocalDispatcher, Plan
from ds_moe.moe.experts import Experts
from ds_moe.moe.routing import ForwardContext, RoutingDecision, current_tape


class MoELayer(nn.Module):
    """Takes the place of a transformers MoE block: (B, S, D) in, (B, S, D) out, same parameter names.

    Args:
        gate: a router; with the family's router class among its bases transformers records its logits.
        experts: the experts this rank owns.
        dispatcher: moves rows between tokens and experts.
        context: padding and image tokens of the micro-batch in flight, shared by the model's layers.
        index: which MoE layer of the model this is, 0 ... L-1.
        balancers: see `balance.py`.
        shared: an expert every token passes, added to the output; None if the family has none.
    """

    def __init__(
        self,
        gate: nn.Module,
        experts: Experts,
        dispatcher: LocalDispatcher | AllToAllDispatcher,
        context: ForwardContext,
        index: int,
        balancers: Sequence[Balancer] = (),
        shared: nn.Module | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not super(): DeepSpeed's layer class may follow in the MRO
        self.experts = experts  # before the gate, as transformers orders them
        self.gate = gate
        self.shared = shared
        self.dispatcher = dispatcher
        self.context = context
        self.index = index
        self.balancers = balancers
        self.load = Load()

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        decision, plan = self._route(x_TD)
        rows_RD = self.dispatcher.dispatch(x_TD, decision, plan)
        rows_RD = self.experts(rows_RD, plan.counts_e)
        y_TD = self.dispatcher.combine(rows_RD, decision, plan)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view_as(hidden_states)

    def _route(self, x_TD: Tensor) -> tuple[RoutingDecision, Plan]:
        """Decide, or repeat what the forward decided if this is a recompute of it."""
        tape = current_tape()
        replaying = tape is not None and tape.replaying
        if replaying:
            token_V, expert_N, plan = tape.kept[self.index]
            decision = self.gate(x_TD, token_V, expert_N)
        else:
            token_V = self.context.token_V
            decision = self.gate(x_TD, token_V)
            plan = self.dispatcher.plan(decision)
            if tape is not None:
                tape.kept[self.index] = (token_V, decision.expert_N, plan)
        if self.training:
            # A recompute runs the balancers too, to save what their gradients need, but reports nothing again.
            losses = [balancer.loss(decision, plan.counts_E, token_V) for balancer in self.balancers]
            if not replaying:
                self.context.aux_losses += losses
                self.load.add(decision, plan.counts_E, self.context)
        return decision, plan


class Load:
    """What this rank's tokens asked of one layer's experts since the last `take`."""

    def __init__(self) -> None:
        self._totals: LoadTotals | None = None

    @torch.no_grad()
    def add(self, decision: RoutingDecision, counts_E: Tensor, context: ForwardContext) -> None:
        image_E = torch.zeros_like(counts_E)
        if context.image_T is not None:
            on_image_N = context.image_T[decision.token_N].to(torch.int64)
            image_E = image_E.scatter_add(0, decision.expert_N, on_image_N)
        scores_VE = decision.scores_TE if context.token_V is None else decision.scores_TE[context.token_V]
        tokens = counts_E.new_tensor(scores_VE.shape[0])
        new = LoadTotals(counts_E, image_E, tokens, torch.special.entr(scores_VE).sum())
        self._totals = new if self._totals is None else LoadTotals(*map(torch.add, self._totals, new))

    def take(self) -> LoadTotals | None:
        """The totals, or None if nothing was added; start anew."""
        totals, self._totals = self._totals, None
        return totals


class LoadTotals(NamedTuple):
    """Sums over the tokens of one rank and layer."""

    counts_E: Tensor  # int64, assignments of each expert
    image_E: Tensor  # int64, of these, of image tokens
    tokens: Tensor  # int64 scalar, padding left out
    entropy: Tensor  # fp32 scalar, nats
