"""The MoE layer: route -> dispatch -> experts -> combine."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ds_moe.moe.balance import Balancer, TokenStats, global_counts
from ds_moe.moe.context import ForwardContext
from ds_moe.moe.decision import RoutingDecision
from ds_moe.moe.dispatch import AllToAllDispatcher, DispatchPlan, LocalDispatcher
from ds_moe.moe.expert_load import ExpertLoad
from ds_moe.moe.experts import Experts
from ds_moe.moe.tape import TapeEntry, current_tape


class MoELayer(nn.Module):
    """Takes the place of a transformers MoE block: (B, S, D) in, (B, S, D) out, same parameter names.

    Args:
        gate: a router; transformers records its logits if the family's router class is among its bases.
        experts: those this rank owns.
        context: shared by the model's layers.
        index: which MoE layer of the model this is, 0 ... L-1.
        shared: an expert that every token uses; its result is added to the output. None if the family has none.
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
        self.experts = experts  # before the gate, which is transformers' order of the parameters
        self.gate = gate
        self.shared = shared
        self.dispatcher = dispatcher
        self.context = context
        self.index = index
        self.balancers = balancers
        self.load = ExpertLoad(gate.weight.shape[0])

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        decision, plan = self._route(x_TD, sequences=hidden_states.shape[0])
        chunks = self.dispatcher.dispatch(x_TD, decision, plan)
        shared_TD = None if self.shared is None else self.shared(x_TD)  # while the rows travel
        experts_of_chunk = self.experts.split(self.dispatcher.chunks)
        outputs = [run(experts) for run, experts in zip(chunks, experts_of_chunk, strict=True)]
        y_TD = self.dispatcher.combine(outputs, plan)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD.view_as(hidden_states)

    def _route(self, x_TD: Tensor, sequences: int) -> tuple[RoutingDecision, DispatchPlan]:
        """Decide; or, in a recompute, repeat what the forward decided."""
        tape = current_tape()
        replaying = tape is not None and tape.replaying
        if replaying:
            chosen, plan, stats = tape.entries[self.index]
            decision = self.gate(x_TD, stats.token_V, chosen)
        else:
            decision = self.gate(x_TD, self.context.token_V, replayed_TK=self._replayed())
            plan = self.dispatcher.plan(decision)
            stats = self._token_stats(x_TD, sequences, plan)
            if tape is not None:
                tape.entries[self.index] = TapeEntry(decision.chosen, plan, stats)
        if self.training:
            # A recompute runs the balancers too, because autograd needs what they save, but reports nothing again.
            losses = [balancer.loss(decision, stats) for balancer in self.balancers]
            if not replaying:
                self.context.aux_losses += losses
                self.load.add(decision, stats, self.context.image_T, self.context.kind_T)
                if self.gate.balancing is not None:
                    self.gate.balancing.add(self._counted(decision, plan))
        return decision, plan

    def _replayed(self) -> Tensor | None:
        """(T, K) experts that this layer must use, -1 where its router decides; None: it decides everywhere."""
        return None if self.context.replayed_TLK is None else self.context.replayed_TLK[:, self.index]

    def _counted(self, decision: RoutingDecision, plan: DispatchPlan) -> Tensor:
        """(E,) assignments that move a loss-free bias. Replayed ones do not: this router did not choose them."""
        replayed_TK = self._replayed()
        if replayed_TK is None or self.context.replay_moves_bias:
            return plan.counts_E
        live_N = replayed_TK[decision.token_N, 0] < 0
        return torch.zeros_like(plan.counts_E).scatter_add_(0, decision.expert_N, live_N.long())

    def _token_stats(self, x_TD: Tensor, sequences: int, plan: DispatchPlan) -> TokenStats:
        """What the balancers may know. The tape keeps it, because a recompute must not run the all-reduce again."""
        token_V = self.context.token_V
        counts = None
        if self.training and any(balancer.scope == "global_batch" for balancer in self.balancers):
            counts = global_counts(token_V, x_TD.shape[0], plan.counts_E)
        return TokenStats(token_V, sequences, plan.counts_E, counts)
