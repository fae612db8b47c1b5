"""Routers: hidden states in, a `RoutingDecision` out. A new kind is one class and one line in `ROUTERS`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_moe.moe.routing import RoutingDecision


class TopKRouter(nn.Module):
    """Softmax over all experts, the K largest of them, renormalised to sum 1 (Qwen3-MoE; Mixtral without the sum).

    The selection is made without a gradient and the weights are gathered from the live scores, so that a forced
    selection (`ids_VK`) runs the same operations and saves the same tensors.

    Args:
        weight_ED: the router matrix, kept as this module's `weight` (the key transformers uses).
        top_k: experts a token, K.
        normalize: divide a token's K weights by their sum.
    """

    def __init__(self, weight_ED: nn.Parameter, top_k: int, normalize: bool = True) -> None:
        nn.Module.__init__(self)  # not super(): a family's router class may follow in the MRO
        if not 1 <= top_k <= weight_ED.shape[0]:
            raise ValueError(f"top_k={top_k} must lie between 1 and the number of experts, {weight_ED.shape[0]}")
        self.weight = weight_ED
        self.top_k = top_k
        self.normalize = normalize

    def forward(self, x_TD: Tensor, token_V: Tensor | None = None, expert_N: Tensor | None = None) -> RoutingDecision:
        """Route.

        Args:
            x_TD: hidden states.
            token_V: indices of the tokens to route; the others get no assignment. None: all.
            expert_N: (V * K,) experts to use instead of the K best, token by token (a recompute's, or a replay's).
        """
        logits_TE = F.linear(x_TD, self.weight)
        scores_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
        scores_VE = scores_TE if token_V is None else scores_TE.index_select(0, token_V)
        if expert_N is None:
            expert_N = scores_VE.detach().topk(self.top_k, dim=-1).indices.flatten()
        ids_VK = expert_N.view(-1, self.top_k)
        weight_VK = scores_VE.gather(1, ids_VK)
        if self.normalize:
            weight_VK = weight_VK / weight_VK.sum(-1, keepdim=True)
        if token_V is None:
            token_V = torch.arange(x_TD.shape[0], device=x_TD.device)
        return RoutingDecision(
            logits_TE, scores_TE, token_V.repeat_interleave(self.top_k), expert_N, weight_VK.flatten()
        )


ROUTERS = {"topk": TopKRouter}
