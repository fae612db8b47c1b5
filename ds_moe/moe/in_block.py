"""Expert layers inside a transformers family's own block, which calls its router and then its experts.

Nearly every family calls them alike: `router(hidden) -> (logits_TE, weight_TK, index_TK)` and `experts(hidden_TD,
index_TK, weight_TK) -> (T, D)`. What else the block does, such as shared experts and their gates, scales, norms and
projections, stays the family's code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ds_moe.moe.backends import Recompute, backend_for
from ds_moe.moe.balance import Balancer
from ds_moe.moe.context import ForwardContext
from ds_moe.moe.decision import Assignments, RoutingDecision
from ds_moe.moe.dispatch import AllToAllDispatcher, DispatchPlan, LocalDispatcher
from ds_moe.moe.expert_load import ExpertLoad
from ds_moe.moe.expert_lora import ALL, ExpertLoRA
from ds_moe.moe.experts import gated, updated_product
from ds_moe.moe.layer import MoELayer
from ds_moe.moe.routers import Router


class InBlock(MoELayer):
    """A family's experts module with the layer's forward: it carries out decisions over all ranks.

    A module becomes one by changing its class to a subclass of this one and of its own, as torch's `fully_shard` does.
    So its weights keep their names, and its gate function, activation and norms stay what they are. They may be gated
    or not, transposed, and have biases; `_run` asks the module. Its router is `gate`: ours (`RouterInBlock`), or the
    family's own, for which a `GivenRouter` stands.

    Attributes:
        num_experts: E, of all ranks.
        fused: whether they are plain SwiGLU, which backends compute as one function.
    """

    shared = None  # the block adds it

    def set_up(
        self,
        num_experts: int,
        dispatcher: LocalDispatcher | AllToAllDispatcher,
        context: ForwardContext,
        index: int,
        balancers: Sequence[Balancer],
        backend: str,
        recompute: Recompute,
        fused: bool,
    ) -> None:
        """What `__init__` does of other layers; `routed_by` comes after it."""
        self.num_experts, self.fused = num_experts, fused
        self.dispatcher, self.context, self.index, self.balancers = dispatcher, context, index, balancers
        self.backend, self.recompute = backend, recompute
        self.load = ExpertLoad(num_experts)
        self._routed: tuple[RoutingDecision, DispatchPlan] | None = None

    @property
    def experts(self) -> InBlock:
        """The module whose parameters are the sharded weights: this one."""
        return self

    def routed_by(self, gate: Router | GivenRouter) -> None:
        """Set `gate`; it is no submodule here, since it is the block's."""
        self.__dict__["gate"] = gate

    def route(self, x_TD: Tensor, choose: Callable[..., RoutingDecision]) -> RouterOutput:
        """Decide for the call of the experts that follows."""
        self._routed = decision, _ = self._route(choose, x_TD.shape[0], self.context.rows)
        return RouterOutput.of(decision, x_TD)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, D) to the same. The index and weights (T, K) count where the family's own router has decided."""
        routed, self._routed = self._routed, None
        if routed is None:
            choose = partial(self.gate, top_k_index, top_k_weights, self.num_experts)
            routed = self._route(choose, top_k_index.shape[0], self.context.rows)
        x_TD = hidden_states.to(self._first.dtype)
        return self._through_experts(x_TD, *routed).to(hidden_states.dtype)

    @property
    def _first(self) -> Tensor:
        return self.get_parameter("gate_up_proj" if self.has_gate else "up_proj")

    def split(self, parts: int) -> list[Callable[[Tensor, Tensor, Tensor | None], Tensor]]:
        """As `Experts.split`."""
        size = self._first.shape[0] // parts
        return [partial(self._run, slice(i * size, (i + 1) * size)) for i in range(parts)]

    def _run(self, experts: slice, rows_RD: Tensor, counts_e: Tensor, weight_R: Tensor | None) -> Tensor:
        backend = backend_for(self.backend, rows_RD)
        whole = experts == slice(0, self._first.shape[0])
        first, second = (weight if whole else weight[experts] for weight in (self._first, self.down_proj))
        if self.is_transposed:
            first, second = first.transpose(1, 2), second.transpose(1, 2)
        lora = self._modules.get("lora")  # see models/lora.py, which gives it to none but plain SwiGLU
        if lora is not None:
            product = updated_product(backend, cast(ExpertLoRA, lora), ALL if whole else experts, counts_e)
            return gated(product, silu, first, second, rows_RD, weight_R)
        if self.fused:
            return backend.swiglu(rows_RD, first, second, counts_e, weight_R, self.recompute)
        rows_RO = backend.multiply(rows_RD, first, counts_e)
        expert_R = None
        if self.has_bias:
            numbers_e = torch.arange(experts.start, experts.stop, device=rows_RD.device)
            expert_R = numbers_e.repeat_interleave(counts_e, output_size=rows_RD.shape[0])
            rows_RO = rows_RO + (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias)[expert_R]
        rows_RF = self._apply_gate(rows_RO) if self.has_gate else self.act_fn(rows_RO)
        rows_RD = backend.multiply(rows_RF, second, counts_e)
        if expert_R is not None:
            rows_RD = rows_RD + self.down_proj_bias[expert_R]
        return rows_RD if weight_R is None else (rows_RD * weight_R.unsqueeze(1)).to(rows_RD.dtype)


class RouterOutput(tuple[Tensor, Tensor, Tensor]):
    """What a family's block is given by our router: logits_TE, and weights and ids (T, 0), which it passes on.

    The experts do not look at them: they carry out `decision`, which need not give each token K experts.
    """

    decision: RoutingDecision

    @classmethod
    def of(cls, decision: RoutingDecision, x_TD: Tensor) -> RouterOutput:
        tokens = x_TD.shape[0]
        output = cls((decision.logits_TE, x_TD.new_empty(tokens, 0), decision.expert_N.new_empty(tokens, 0)))
        output.decision = decision
        return output


class RouterInBlock(Router):
    """Comes before a kind of router in the bases of one that a family's block calls."""

    layer: InBlock

    def forward(self, hidden_states: Tensor, *of_family: object) -> RouterOutput:
        """Whatever else the block gives its router, such as a bias, our router holds itself."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.layer.route(x_TD, partial(super().forward, x_TD))


class GivenRouter(nn.Module):
    """Stands for a family's own router and makes a `RoutingDecision` of what that has decided.

    How the family scores experts is not known here, so the scores are the combine weights, and 0 for other experts.
    """

    balancing = None

    def __init__(self, name: str, top_k: int) -> None:
        super().__init__()
        self.name, self.top_k = name, top_k

    def forward(
        self,
        index_TK: Tensor,
        weight_TK: Tensor,
        num_experts: int,
        token_V: Tensor | None = None,
        chosen: Assignments | None = None,
        replayed_TK: Tensor | None = None,
    ) -> RoutingDecision:
        """As `Router.forward`. A recompute that is given `chosen` has the experts of its forward and new weights.

        Raises:
            ValueError: a replay, for which weights would have to be computed as the family does.
        """
        if replayed_TK is not None:
            raise ValueError(f"routing cannot be replayed: this model keeps its own router, {self.name}")
        tokens, top_k = index_TK.shape
        wide_TK = weight_TK.to(torch.promote_types(weight_TK.dtype, torch.float32))
        scores_TE = torch.zeros(tokens, num_experts, dtype=wide_TK.dtype, device=wide_TK.device)
        scores_TE = scores_TE.scatter_add(1, index_TK, wide_TK.detach())
        every = torch.arange(tokens, device=index_TK.device) if token_V is None else token_V
        rows = slice(None) if token_V is None else token_V
        if chosen is None:
            experts_N, every_k = index_TK[rows].flatten(), top_k if token_V is None else None
            chosen = Assignments(every.repeat_interleave(top_k), experts_N, top_k=every_k)
        weight_N = wide_TK[rows].flatten()
        return RoutingDecision(scores_TE, scores_TE, chosen.token_N, chosen.expert_N, weight_N, top_k=chosen.top_k)


Output = TypeVar("Output")


def decision_in(output: RouterOutput | Output) -> RoutingDecision | Output:
    """The decision in what a layer's `gate` returned, wherever the layer is; anything else as it is."""
    return output.decision if isinstance(output, RouterOutput) else output
