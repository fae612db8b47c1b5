"""Balancers: what keeps the experts evenly loaded. They compose; each says what it adds to the loss.

A new kind is one class and one line in `BALANCERS`. The kind `none` is the empty list.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ds_moe.moe.routing import RoutingDecision


class Balancer(Protocol):
    """Sees the decisions of a layer. A recompute calls it again and discards the result: it must hold no state."""

    def loss(self, decision: RoutingDecision, counts_E: Tensor, token_V: Tensor | None) -> Tensor:
        """What this decision adds to the micro-batch's loss: a scalar with grad, already weighted.

        Args:
            counts_E: this rank's assignments of each expert, int64.
            token_V: indices of the tokens that are no padding; None: all.
        """
        ...


class AuxLoss:
    """Switch Transformer's load-balancing loss (Fedus 2021, eq. 4-6), over one micro-batch and layer.

    `weight * E * sum_i f_i * P_i`, where f_i is the share of tokens that use expert i (the f_i sum to K) and P_i
    the mean score of expert i over the tokens. Perfectly balanced it is `weight * K`. Padding enters neither. It is a
    function of the micro-batch: another micro_batch_size gives another loss.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def loss(self, decision: RoutingDecision, counts_E: Tensor, token_V: Tensor | None) -> Tensor:
        scores_VE = decision.scores_TE
        if token_V is not None:
            scores_VE = scores_VE.index_select(0, token_V)
        tokens = max(scores_VE.shape[0], 1)
        f_E = counts_E.to(torch.float32) / tokens
        p_E = scores_VE.sum(0) / tokens
        return self.weight * counts_E.numel() * (f_E * p_E).sum()


class LossFreeBalancing(nn.Module):
    """Auxiliary-loss-free balancing (DeepSeek, Wang 2024): a bias per expert that selects and never weighs."""

    def __init__(self, num_experts: int, update_rate: float = 1e-3) -> None:
        super().__init__()
        self.update_rate = update_rate
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))

    def forward(self, scores_TE: Tensor) -> Tensor:
        """Scores to rank experts by; the weights come from the scores themselves."""
        return scores_TE + self.bias_E


BALANCERS = {"aux": AuxLoss}
