"""Dispatchers move rows to their experts and back. Dropless: a row is never lost, an expert or a rank may get none.

`dispatch` sorts the N assignments by expert and starts the all-to-all of their rows; each `Chunk` of rows then runs
through its experts; `combine` sums what comes back per token. A `DispatchPlan` holds the sort and the counts, so that a
recompute moves its rows exactly as its forward did.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ds_moe.moe.all_to_all import AllToAll, ExpertParallel, RowCounts
from ds_moe.moe.backends import Permutation, backend_for
from ds_moe.moe.decision import RoutingDecision
from ds_moe.moe.permute import inverse, permute, sort_by_expert, sum_per_token, to_experts

ApplyWeight = Literal["before", "after"]
RunExperts = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # rows, rows of each expert, combine weights -> rows
# Rows for some of this rank's experts, which may still be travelling. Called with these experts, a chunk waits for its
# rows, runs them and sends the results back. It returns a function that waits for those of this rank's own tokens.
Chunk = Callable[[RunExperts], Callable[[], Tensor]]


@dataclass
class DispatchPlan:
    """How N assignments become rows grouped by expert."""

    permutation: Permutation
    counts_E: Tensor  # int64: this rank's assignments of every global expert
    row_counts: RowCounts | None = None  # how many rows travel between ranks; None: every expert is on this rank


class Dispatcher:
    """What every kind shares: the sort and the sum.

    Args:
        ep: this rank's place among those that share the experts.
        backend: a kind of kernels, see `backends`.
        apply_weight: `after` multiplies what an expert gives by the combine weight. `before` multiplies what the expert
            gets (Llama 4; torchtitan's score_before_experts), which is another function: experts are not linear.
    """

    chunks = 1  # `dispatch` returns this many, each for an equal number of experts

    def __init__(self, ep: ExpertParallel, backend: str = "auto", apply_weight: ApplyWeight = "after") -> None:
        self.ep = ep
        self.backend = backend
        self.apply_weight: ApplyWeight = apply_weight

    def permutation(self, decision: RoutingDecision, keys_N: Tensor) -> Permutation:
        """Sort the decision's list by `keys_N`, int64 in 0 ... E-1; each expert has a key of its own."""
        backend = backend_for(self.backend, decision.logits_TE)
        return sort_by_expert(backend, decision.token_N, keys_N, *decision.logits_TE.shape, decision.top_k)

    def sorted_rows(self, x_TD: Tensor, decision: RoutingDecision, plan: DispatchPlan) -> tuple[Tensor, Tensor | None]:
        """(N, D) rows sorted by expert, in the dtype of `x_TD`, and the (N,) weights that the experts have to apply.

        The weights are None if they have been applied already.
        """
        rows_ND = to_experts(backend_for(self.backend, x_TD), x_TD, plan.permutation)
        weight_N = permute(decision.weight_N, plan.permutation.order_N)
        if self.apply_weight == "before":
            return (rows_ND * weight_N.unsqueeze(1)).to(x_TD.dtype), None
        return rows_ND, weight_N

    def combine(self, outputs: list[Callable[[], Tensor]], plan: DispatchPlan) -> Tensor:
        """Wait for the results of all chunks, given what they returned, and sum them per token: (T, D)."""
        rows = [output() for output in outputs]
        rows_ND = rows[0] if len(rows) == 1 else torch.cat(rows)
        return sum_per_token(backend_for(self.backend, rows_ND), rows_ND, plan.permutation)


class LocalDispatcher(Dispatcher):
    """Every expert lives on this rank: sort, and sort back."""

    def __init__(self, backend: str = "auto", apply_weight: ApplyWeight = "after") -> None:
        super().__init__(ExpertParallel(), backend, apply_weight)

    def plan(self, decision: RoutingDecision) -> DispatchPlan:
        permutation = self.permutation(decision, decision.expert_N)
        return DispatchPlan(permutation, permutation.counts_E)

    def dispatch(self, x_TD: Tensor, decision: RoutingDecision, plan: DispatchPlan) -> list[Chunk]:
        rows_ND, weight_N = self.sorted_rows(x_TD, decision, plan)

        def run(experts: RunExperts) -> Callable[[], Tensor]:
            results_ND = experts(rows_ND, plan.counts_E, weight_N)
            return lambda: results_ND

        return [run]


class AllToAllDispatcher(Dispatcher):
    """The ranks of `ep` share the experts: an all-to-all of counts, one of rows and their weights, one of rows back.

    Args:
        chunks: split the rank's experts into so many chunks, so that the rows of one chunk travel while another is
            computed; must divide the number of experts a rank.
    """

    def __init__(
        self, ep: ExpertParallel, backend: str = "auto", apply_weight: ApplyWeight = "after", chunks: int = 1
    ) -> None:
        super().__init__(ep, backend, apply_weight)
        self.chunks = chunks

    def plan(self, decision: RoutingDecision) -> DispatchPlan:
        """Collective over the EP group: starts the all-to-all of counts."""
        num_experts = decision.logits_TE.shape[1]
        shape = self.ep.size, self.chunks, num_experts // (self.ep.size * self.chunks)
        if self.chunks == 1:
            permutation = self.permutation(decision, decision.expert_N)
            return DispatchPlan(permutation, permutation.counts_E, RowCounts(permutation.counts_E.view(shape), self.ep))
        # Sort by chunk before rank, so that the rows that leave for one chunk are contiguous.
        experts_E = torch.arange(num_experts, device=decision.expert_N.device)
        expert_of_key_E = experts_E.view(shape).transpose(0, 1).flatten()
        key_of_expert_E = inverse(expert_of_key_E)
        permutation = self.permutation(decision, key_of_expert_E[decision.expert_N])
        counts_E = permutation.counts_E[key_of_expert_E]
        return DispatchPlan(permutation, counts_E, RowCounts(counts_E.view(shape), self.ep))

    def dispatch(self, x_TD: Tensor, decision: RoutingDecision, plan: DispatchPlan) -> list[Chunk]:
        """Collective: packs the rows, then waits for the counts on the host, then sends all chunks off."""
        assert plan.row_counts is not None
        rows_ND, weight_N = self.sorted_rows(x_TD, decision, plan)
        send_nP, receive_nP = plan.row_counts.on_host()
        sizes = [sum(send_P) for send_P in send_nP]
        weights = [None] * self.chunks if weight_N is None else weight_N.split(sizes)
        chunks: list[Chunk] = []
        for i, (rows, weight) in enumerate(zip(rows_ND.split(sizes), weights, strict=True)):
            outward = AllToAll(self.ep, send_nP[i], receive_nP[i])
            travelling = outward.start(rows) if weight is None else outward.start(rows, weight)
            chunks.append(partial(_run_received, outward, travelling, plan.row_counts.received_Pne[:, i]))
        return chunks


def _run_received(
    outward: AllToAll, travelling: tuple[Tensor, ...], received_Pe: Tensor, experts: RunExperts
) -> Callable[[], Tensor]:
    """A `Chunk` of rows by rank, then by expert, with their weights if the experts apply them."""
    rows_RD, *weights = outward.wait(*travelling)
    by_expert_R = regrouped(received_Pe, rows_RD.shape[0])
    weight_R = permute(weights[0], by_expert_R) if weights else None
    rows_RD = experts(permute(rows_RD, by_expert_R), received_Pe.sum(0), weight_R)
    by_rank_RD = permute(rows_RD, regrouped(received_Pe.T, rows_RD.shape[0]))
    homeward = outward.reverse()
    returning = homeward.start(by_rank_RD)
    return lambda: homeward.wait(*returning)[0]


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
