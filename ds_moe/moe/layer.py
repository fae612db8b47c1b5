"""The MoE layer: route -> dispatch -> experts -> combine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ds_moe.moe.balance import Balancer, Seen, everywhere
from ds_moe.moe.context import ForwardContext
from ds_moe.moe.decision import RoutingDecision
from ds_moe.moe.dispatch import AllToAllDispatcher, LocalDispatcher, Plan
from ds_moe.moe.expert_load import Load
from ds_moe.moe.experts import Experts
from ds_moe.moe.tape import current_tape


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
        self.load = Load(gate.weight.shape[0])

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        decision, plan = self._route(x_TD, sequences=hidden_states.shape[0])
        parts = self.dispatcher.dispatch(x_TD, decision, plan)
        shared_TD = None if self.shared is None else self.shared(x_TD)  # while the rows travel
        experts = self.experts.split(self.dispatcher.parts)
        outputs = [part.through(run) for part, run in zip(parts, experts, strict=True)]
        y_TD = self.dispatcher.combine(outputs, plan)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD.view_as(hidden_states)

    def _route(self, x_TD: Tensor, sequences: int) -> tuple[RoutingDecision, Plan]:
        """Decide, or repeat what the forward decided if this is a recompute of it."""
        tape = current_tape()
        replaying = tape is not None and tape.replaying
        if replaying:
            chosen, plan, seen = tape.kept[self.index]
            decision = self.gate(x_TD, seen.token_V, chosen)
        else:
            decision = self.gate(x_TD, self.context.token_V, replayed_TK=self._replayed())
            plan = self.dispatcher.plan(decision)
            seen = self._seen(x_TD, sequences, plan)
            if tape is not None:
                tape.kept[self.index] = (decision.chosen, plan, seen)
        if self.training:
            # A recompute runs the balancers too, to save what their gradients need, but reports nothing again.
            losses = [balancer.loss(decision, seen) for balancer in self.balancers]
            if not replaying:
                self.context.aux_losses += losses
                self.load.add(decision, seen, self.context.image_T, self.context.kind_T)
                if self.gate.balancing is not None:
                    self.gate.balancing.add(self._counted(decision, plan))
        return decision, plan

    def _replayed(self) -> Tensor | None:
        """(T, K) experts that this layer must use, -1 where its router decides; None: it decides everywhere."""
        return None if self.context.replayed_TLK is None else self.context.replayed_TLK[:, self.index]

    def _counted(self, decision: RoutingDecision, plan: Plan) -> Tensor:
        """(E,) assignments that move a loss-free bias: replayed ones say nothing about this router."""
        replayed_TK = self._replayed()
        if replayed_TK is None or self.context.replay_moves_bias:
            return plan.counts_E
        live_N = replayed_TK[decision.token_N, 0] < 0
        return torch.zeros_like(plan.counts_E).scatter_add_(0, decision.expert_N, live_N.long())

    def _seen(self, x_TD: Tensor, sequences: int, plan: Plan) -> Seen:
        """What the balancers may know; kept on the tape, because adding up over ranks must not happen twice."""
        token_V = self.context.token_V
        reduced = None
        if self.training and any(balancer.scope == "global_batch" for balancer in self.balancers):
            reduced = everywhere(token_V, x_TD.shape[0], plan.counts_E)
        return Seen(token_V, sequences, plan.counts_E, reduced)
