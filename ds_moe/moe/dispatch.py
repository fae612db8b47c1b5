"""Dispatchers move rows to their experts and back. Dropless: a row is never lost, an expert or a rank may get none.

`dispatch` sorts the N assignments by expert and hands the rows over; `combine` brings the experts' outputs back
and adds them up per token. What both need to agree on is the `Plan`, which a recompute reuses as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe.moe.routing import RoutingDecision, count_experts

ApplyWeight = Literal["before", "after"]


@dataclass
class ExpertParallel:
    """Where one rank stands among the ranks that share one copy of the experts.

    `group` may be filled in later (DeepSpeed creates its groups during `initialize`); it is read at every forward.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    def owned(self, num_experts: int) -> slice:
        """The global experts of this rank: a contiguous block."""
        if num_experts % self.size:
            raise ValueError(f"ep_size={self.size} does not divide the {num_experts} experts")
        local = num_experts // self.size
        return slice(self.rank * local, (self.rank + 1) * local)


@dataclass
class Plan:
    """How N assignments become rows grouped by expert."""

    order_N: Tensor  # int64: position in the sorted list -> position in the decision's list
    counts_E: Tensor  # int64: this rank's assignments of every global expert
    counts_e: Tensor  # int64: rows of each local expert, from all ranks
    send: list[int] | None = None  # rows to each rank of the EP group
    receive: list[int] | None = None  # rows from each rank
    by_expert_R: Tensor | None = None  # int64: received rows (by rank, then expert) -> rows by expert


class Dispatcher:
    """What every kind shares: the sort and the weights.

    Args:
        apply_weight: `after`: the combine weight multiplies what an expert gives. `before`: it multiplies what the
            expert gets (Llama 4; torchtitan's score_before_experts), another function, experts being no linear maps.
    """

    def __init__(self, apply_weight: ApplyWeight = "after") -> None:
        self.apply_weight: ApplyWeight = apply_weight

    def sorted_rows(self, x_TD: Tensor, decision: RoutingDecision, plan: Plan) -> Tensor:
        """(N, D) rows sorted by expert, in the dtype of `x_TD`."""
        rows_ND = x_TD.index_select(0, decision.token_N.index_select(0, plan.order_N))
        return _weighted(rows_ND, decision, plan).to(x_TD.dtype) if self.apply_weight == "before" else rows_ND

    def added_up(self, rows_ND: Tensor, decision: RoutingDecision, plan: Plan) -> Tensor:
        """The sorted rows of each token added up in fp32: (T, D) in the rows' dtype."""
        summands_ND = (
            _weighted(rows_ND, decision, plan) if self.apply_weight == "after" else rows_ND.to(decision.weight_N.dtype)
        )
        y_TD = summands_ND.new_zeros(decision.logits_TE.shape[0], rows_ND.shape[1])
        y_TD = y_TD.index_add(0, decision.token_N.index_select(0, plan.order_N), summands_ND)
        return y_TD.to(rows_ND.dtype)


def _weighted(rows_ND: Tensor, decision: RoutingDecision, plan: Plan) -> Tensor:
    """Sorted rows times their combine weights, in fp32."""
    return rows_ND * decision.weight_N.index_select(0, plan.order_N).unsqueeze(1)


class LocalDispatcher(Dispatcher):
    """Every expert lives on this rank: sort, and sort back."""

    def plan(self, decision: RoutingDecision) -> Plan:
        counts_E = count_experts(decision.expert_N, decision.logits_TE.shape[1])
        return Plan(torch.argsort(decision.expert_N, stable=True), counts_E, counts_E)

    def dispatch(self, x_TD: Tensor, decision: RoutingDecision, plan: Plan) -> Tensor:
        """(T, D) -> (R, D) rows sorted by local expert, `plan.counts_e` each."""
        return self.sorted_rows(x_TD, decision, plan)

    def combine(self, rows_RD: Tensor, decision: RoutingDecision, plan: Plan) -> Tensor:
        """(R, D) expert outputs -> (T, D), weighted and summed per token."""
        return self.added_up(rows_RD, decision, plan)


class AllToAllDispatcher(Dispatcher):
    """Experts are spread over the ranks of `ep`: one exchange of counts, one of rows, and one back."""

    def __init__(self, ep: ExpertParallel, apply_weight: ApplyWeight = "after") -> None:
        super().__init__(apply_weight)
        self.ep = ep

    def plan(self, decision: RoutingDecision) -> Plan:
        """Collective over the EP group. Uneven splits need the counts on the host: the layer's only sync."""
        counts_E = count_experts(decision.expert_N, decision.logits_TE.shape[1])
        sent_Pe = counts_E.view(self.ep.size, -1)
        received_Pe = torch.empty_like(sent_Pe)
        dist.all_to_all_single(received_Pe, sent_Pe, group=self.ep.group)
        send, receive = torch.stack([sent_Pe.sum(1), received_Pe.sum(1)]).tolist()
        local_ids = torch.arange(received_Pe.shape[1], device=counts_E.device).repeat(self.ep.size)
        by_expert_R = torch.argsort(
            local_ids.repeat_interleave(received_Pe.flatten(), output_size=sum(receive)), stable=True
        )
        order_N = torch.argsort(decision.expert_N, stable=True)
        return Plan(order_N, counts_E, received_Pe.sum(0), send, receive, by_expert_R)

    def dispatch(self, x_TD: Tensor, decision: RoutingDecision, plan: Plan) -> Tensor:
        """(T, D) -> (R, D): the rows of all ranks for this rank's experts, sorted by expert."""
        rows_ND = self.sorted_rows(x_TD, decision, plan)
        rows_RD = _AllToAll.apply(rows_ND, plan.send, plan.receive, self.ep.group)
        return _Permute.apply(rows_RD, plan.by_expert_R)

    def combine(self, rows_RD: Tensor, decision: RoutingDecision, plan: Plan) -> Tensor:
        """(R, D) outputs of this rank's experts -> (T, D) of this rank's tokens."""
        by_rank_RD = _Permute.apply(rows_RD, torch.argsort(plan.by_expert_R))
        rows_ND = _AllToAll.apply(by_rank_RD, plan.receive, plan.send, self.ep.group)
        return self.added_up(rows_ND, decision, plan)


class _AllToAll(torch.autograd.Function):
    """Rows to their ranks; the gradient takes the way back. Runs with zero rows too, so that no rank is missed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        ctx.exchange = (receive, send, group)
        out = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grads[0], *ctx.exchange), None, None, None


class _Permute(torch.autograd.Function):
    """`rows[order]` for a permutation: its gradient is a gather too, not a scatter-add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, torch.argsort(order)), None


DISPATCHERS = {"local": lambda ep, apply_weight: LocalDispatcher(apply_weight), "all_to_all": AllToAllDispatcher}
