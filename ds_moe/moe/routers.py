"""Routers: hidden states in, a `RoutingDecision` out. A new kind is one class and one line in `ROUTERS`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_moe.moe.balance import LossFreeBalancing
from ds_moe.moe.routing import Assignments, RoutingDecision


class Router(nn.Module):
    """score -> select -> weigh: what every kind shares.

    The selection is made without a gradient and the weights are computed from the live scores of whatever was
    selected, so that a given selection (`chosen`: a recompute's, or a replay's) runs the same operations and saves the
    same tensors.

    Args:
        weight_ED: the router matrix, kept as this module's `weight` (the key transformers uses).
    """

    def __init__(self, weight_ED: nn.Parameter) -> None:
        nn.Module.__init__(self)  # not super(): a family's router class may follow in the MRO
        self.weight = weight_ED
        self.balancing: LossFreeBalancing | None = None  # shifts what is selected, never a weight

    def forward(
        self, x_TD: Tensor, token_V: Tensor | None = None, chosen: Assignments | None = None
    ) -> RoutingDecision:
        """Route.

        Args:
            x_TD: hidden states.
            token_V: indices of the tokens to route; the others get no assignment. None: all.
            chosen: assignments to use instead of selecting.
        """
        logits_TE = self.logits(x_TD)
        scores_TE = self.score(logits_TE)
        if chosen is None:
            with torch.no_grad():
                ranked_TE = scores_TE if self.balancing is None else self.balancing(scores_TE)
                chosen = self.select(ranked_TE, token_V)
        return RoutingDecision(logits_TE, scores_TE, *chosen, self.weigh(scores_TE, chosen))

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E) raw logits in the model's dtype, with grad."""
        return F.linear(x_TD, self.weight)

    def score(self, logits_TE: Tensor) -> Tensor:
        """(T, E) fp32 scores, with grad."""
        return torch.softmax(logits_TE, dim=-1, dtype=torch.float32)

    def select(self, ranked_TE: Tensor, token_V: Tensor | None) -> Assignments:
        """The assignments; without a gradient. `ranked_TE` are the scores, shifted by a loss-free bias if there is one."""
        raise NotImplementedError

    def weigh(self, scores_TE: Tensor, chosen: Assignments) -> Tensor:
        """(N,) fp32 combine weights from the live scores, with grad."""
        raise NotImplementedError


class TopKRouter(Router):
    """Softmax over all experts, the K largest of them, renormalised to sum 1 (Qwen3-MoE; Mixtral without the sum).

    Args:
        top_k: experts a token, K.
        normalize: divide a token's K weights by their sum.
    """

    def __init__(self, weight_ED: nn.Parameter, top_k: int, normalize: bool = True) -> None:
        Router.__init__(self, weight_ED)
        if not 1 <= top_k <= weight_ED.shape[0]:
            raise ValueError(f"top_k={top_k} must lie between 1 and the number of experts, {weight_ED.shape[0]}")
        self.top_k = top_k
        self.normalize = normalize

    def select(self, ranked_TE: Tensor, token_V: Tensor | None) -> Assignments:
        ranked_VE = ranked_TE if token_V is None else ranked_TE.index_select(0, token_V)
        if token_V is None:
            token_V = torch.arange(ranked_TE.shape[0], device=ranked_TE.device)
        ids_VK = ranked_VE.topk(self.top_k, dim=-1).indices
        return Assignments(token_V.repeat_interleave(self.top_k), ids_VK.flatten())

    def weigh(self, scores_TE: Tensor, chosen: Assignments) -> Tensor:
        weight_N = scores_TE[chosen.token_N, chosen.expert_N]
        if self.normalize:
            weight_VK = weight_N.view(-1, self.top_k)
            weight_N = (weight_VK / weight_VK.sum(-1, keepdim=True)).flatten()
        return weight_N


ROUTERS = {"topk": TopKRouter}
