"""Dispatchers move rows to their experts and back. Dropless: a row is never lost, an expert or a rank may get none.

`dispatch` sorts the N assignments by expert and sends the rows off; each `Part` of them goes `through` the experts;
`combine` adds up what comes back per token. What these need to agree on is the `Plan`, which a recompute reuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ds_moe.moe.all_to_all import Counts, ExpertParallel, Trip, arrive, depart
from ds_moe.moe.backends import Order, backend_for
from ds_moe.moe.decision import RoutingDecision
from ds_moe.moe.permute import add_up, inverse, order_by_expert, permute, spread

ApplyWeight = Literal["before", "after"]
RunExperts = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # rows, rows of each expert, combine weights -> rows


@dataclass
class Plan:
    """How N assignments become rows grouped by expert."""

    order: Order
    counts_E: Tensor  # int64: this rank's assignments of every global expert
    counts: Counts | None = None  # of the exchange; None: every expert is here


class Part(Protocol):
    """Rows for some of this rank's experts, perhaps still on their way."""

    def through(self, experts: RunExperts) -> Callable[[], Tensor]:
        """Wait for the rows, run the experts and send the result off; what is returned waits for its arrival."""
        ...


class Dispatcher:
    """What every kind shares: the sort and the sum.

    Args:
        ep: this rank's place among those that share the experts.
        backend: a kind of kernels, see `backends`.
        apply_weight: `after`: the combine weight multiplies what an expert gives. `before`: it multiplies what the
            expert gets (Llama 4; torchtitan's score_before_experts), another function, experts being no linear maps.
    """

    parts = 1  # `dispatch` returns this many, each for as many experts

    def __init__(self, ep: ExpertParallel, backend: str = "auto", apply_weight: ApplyWeight = "after") -> None:
        self.ep = ep
        self.backend = backend
        self.apply_weight: ApplyWeight = apply_weight

    def order(self, decision: RoutingDecision, keys_N: Tensor) -> Order:
        """The decision's list sorted by key, one an expert."""
        backend = backend_for(self.backend, decision.logits_TE)
        return order_by_expert(backend, decision.token_N, keys_N, *decision.logits_TE.shape, decision.top_k)

    def sorted_rows(self, x_TD: Tensor, decision: RoutingDecision, plan: Plan) -> tuple[Tensor, Tensor | None]:
        """(N, D) rows sorted by expert in the dtype of `x_TD`, and the (N,) weights for the experts to apply, if so."""
        rows_ND = spread(backend_for(self.backend, x_TD), x_TD, plan.order)
        weight_N = permute(decision.weight_N, plan.order.order_N)
        if self.apply_weight == "before":
            return (rows_ND * weight_N.unsqueeze(1)).to(x_TD.dtype), None
        return rows_ND, weight_N

    def combine(self, outputs: list[Callable[[], Tensor]], plan: Plan) -> Tensor:
        """What the parts' `through` returned -> (T, D) of this rank's tokens, summed per token."""
        rows = [output() for output in outputs]
        rows_ND = rows[0] if len(rows) == 1 else torch.cat(rows)
        return add_up(backend_for(self.backend, rows_ND), rows_ND, plan.order)


class LocalDispatcher(Dispatcher):
    """Every expert lives on this rank: sort, and sort back."""

    def __init__(self, backend: str = "auto", apply_weight: ApplyWeight = "after") -> None:
        super().__init__(ExpertParallel(), backend, apply_weight)

    def plan(self, decision: RoutingDecision) -> Plan:
        order = self.order(decision, decision.expert_N)
        return Plan(order, order.counts_E)

    def dispatch(self, x_TD: Tensor, decision: RoutingDecision, plan: Plan) -> list[Part]:
        return [_Here(*self.sorted_rows(x_TD, decision, plan), plan.counts_E)]


@dataclass
class _Here:
    rows_ND: Tensor
    weight_N: Tensor | None
    counts_E: Tensor

    def through(self, experts: RunExperts) -> Callable[[], Tensor]:
        rows_ND = experts(self.rows_ND, self.counts_E, self.weight_N)
        return lambda: rows_ND


class AllToAllDispatcher(Dispatcher):
    """Experts are spread over the ranks of `ep`: an exchange of counts, of rows and of their weights, of rows back.

    Args:
        chunks: exchange and compute the rank's experts in so many parts, so that the rows of one part travel while
            another is computed; must divide the number of experts a rank.
    """

    def __init__(
        self, ep: ExpertParallel, backend: str = "auto", apply_weight: ApplyWeight = "after", chunks: int = 1
    ) -> None:
        super().__init__(ep, backend, apply_weight)
        self.parts = chunks

    def plan(self, decision: RoutingDecision) -> Plan:
        """Collective over the EP group: starts the exchange of counts."""
        num_experts = decision.logits_TE.shape[1]
        shape = self.ep.size, self.parts, num_experts // (self.ep.size * self.parts)
        if self.parts == 1:
            order = self.order(decision, decision.expert_N)
            return Plan(order, order.counts_E, Counts(order.counts_E.view(shape), self.ep))
        # Sorted by part before rank, so that what leaves for one part lies together.
        experts_E = torch.arange(num_experts, device=decision.expert_N.device)
        expert_of_key_E = experts_E.view(shape).transpose(0, 1).flatten()
        key_of_expert_E = inverse(expert_of_key_E)
        order = self.order(decision, key_of_expert_E[decision.expert_N])
        counts_E = order.counts_E[key_of_expert_E]
        return Plan(order, counts_E, Counts(counts_E.view(shape), self.ep))

    def dispatch(self, x_TD: Tensor, decision: RoutingDecision, plan: Plan) -> list[Part]:
        """Collective: packs the rows, then waits for the counts on the host, then sends all parts off."""
        assert plan.counts is not None
        rows_ND, weight_N = self.sorted_rows(x_TD, decision, plan)
        send_nP, receive_nP = plan.counts.on_host()
        sizes = [sum(send) for send in send_nP]
        parts: list[Part] = []
        weights = [None] * self.parts if weight_N is None else weight_N.split(sizes)
        for part, (rows, weight) in enumerate(zip(rows_ND.split(sizes), weights, strict=True)):
            trip = Trip(self.ep, send_nP[part], receive_nP[part])
            arriving = depart(trip, rows) if weight is None else depart(trip, rows, weight)
            parts.append(_Arriving(trip, arriving, plan.counts.received_Pne[:, part]))
        return parts


@dataclass
class _Arriving:
    trip: Trip
    tensors: tuple[Tensor, ...]  # rows, and their weights if the experts apply them; by rank, then by expert
    received_Pe: Tensor  # int64: how many from each rank for each expert

    def through(self, experts: RunExperts) -> Callable[[], Tensor]:
        rows_RD, *weights = arrive(self.trip, *self.tensors)
        by_expert_R = regrouped(self.received_Pe, rows_RD.shape[0])
        weight_R = permute(weights[0], by_expert_R) if weights else None
        rows_RD = experts(permute(rows_RD, by_expert_R), self.received_Pe.sum(0), weight_R)
        by_rank_RD = permute(rows_RD, regrouped(self.received_Pe.T, rows_RD.shape[0]))
        back = Trip(self.trip.ep, *self.trip.splits[::-1])
        travelling = depart(back, by_rank_RD)
        return lambda: arrive(back, *travelling)[0]


def regrouped(counts_AB: Tensor, rows: int) -> Tensor:
    """Where rows grouped by a, then b, stand once they are grouped by b, then a: int64 (R,), without a sort."""
    before_AB = (counts_AB.flatten().cumsum(0) - counts_AB.flatten()).view_as(counts_AB)
    counts_B_A = counts_AB.T.flatten()
    shift_B_A = before_AB.T.flatten() - (counts_B_A.cumsum(0) - counts_B_A)
    places_R = torch.arange(rows, device=counts_AB.device)
    return places_R + shift_B_A.repeat_interleave(counts_B_A, output_size=rows)


DISPATCHERS = {
    "local": lambda ep, backend, apply_weight, chunks: LocalDispatcher(backend, apply_weight),  # no rows travel
    "all_to_all": AllToAllDispatcher,
}
