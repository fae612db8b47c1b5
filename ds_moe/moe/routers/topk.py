"""Each token chooses its K best experts."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_moe.moe.decision import Assignments
from ds_moe.moe.routers.base import TINY, Router, routed, score_dtype, share_of_token

Scores = Literal["softmax", "sigmoid"]
Order = Literal["softmax_then_topk", "topk_then_softmax"]
GroupScore = Literal["top2", "max"]


class TopKRouter(Router, kind="topk"):
    """The K experts with the largest scores.

    Qwen3-MoE: softmax, normalised. Mixtral and GPT-OSS: `topk_then_softmax`. DeepSeek-V3 (2024, eq. 12-16): sigmoid,
    normalised, `route_scale` 2.5, 8 groups of which 4 remain.

    Args:
        normalize: divide a token's weights by the sum of those that dropout and capacity leave it.
        scores: `softmax` over all experts, or the `sigmoid` of each expert alone.
        order: `topk_then_softmax` takes the softmax over the chosen logits alone. It is computed as the softmax over
            all, divided by the sum over the chosen, which is the same; `normalize` is implied.
        route_scale: factor of all weights.
        groups: split the experts into this many groups of neighbours (those of a node, say); a token chooses only from
            its best `top_groups` groups. A group's score is the sum of its two best experts' (or that of its only one).
        temperature: logits are divided by it before they are scored.
        limits: the other arguments of `Router`.

    Raises:
        ValueError: groups that do not divide the experts, or hold fewer than K.
    """

    def __init__(
        self,
        weight_ED: nn.Parameter,
        top_k: int,
        *,
        normalize: bool,
        scores: Scores,
        order: Order,
        route_scale: float,
        groups: int | None,
        top_groups: int | None,
        temperature: float,
        group_score: GroupScore = "top2",
        group_fill: float = -torch.inf,
        bias_on: Literal["scores", "logits"] = "scores",
        eps: float = TINY,
        fp32_logits: bool = False,
        **limits: object,
    ) -> None:
        Router.__init__(self, weight_ED, top_k, **limits)
        experts = weight_ED.shape[0]
        if (groups is None) != (top_groups is None):
            raise ValueError(f"groups={groups} and top_groups={top_groups}: give both or none")
        if groups and top_groups and (experts % groups or not top_k <= top_groups * experts // groups <= experts):
            raise ValueError(f"{top_groups=} of {groups=} cannot give {top_k=} of {experts} experts")
        if scores == "sigmoid" and order == "topk_then_softmax":
            raise ValueError("order topk_then_softmax needs scores softmax")
        self.normalize = normalize or order == "topk_then_softmax"
        self.scores: Scores = scores
        self.route_scale = route_scale
        self.groups, self.top_groups = groups, top_groups
        self.temperature = temperature
        self.group_score: GroupScore = group_score
        self.group_fill = group_fill
        self.bias_on = bias_on
        self.eps = eps
        self.fp32_logits = fp32_logits

    def logits(self, x_TD: Tensor) -> Tensor:
        if not self.fp32_logits:
            return super().logits(x_TD)
        wide = score_dtype(x_TD)
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.to(wide), self.weight.to(wide))

    def rank(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        return super().rank(logits_TE, scores_TE if self.bias_on == "scores" else logits_TE)

    def score(self, logits_TE: Tensor) -> Tensor:
        logits_TE = logits_TE.to(score_dtype(logits_TE))
        if self.temperature != 1:
            logits_TE = logits_TE / self.temperature
        return logits_TE.sigmoid() if self.scores == "sigmoid" else logits_TE.softmax(-1)

    def select(self, ranked_TE: Tensor, token_V: Tensor | None) -> Assignments:
        every_k = self.top_k if token_V is None else None
        token_V, ranked_VE = routed(ranked_TE, token_V)
        if self.groups is not None and self.top_groups is not None:
            ranked_VE = self._best_groups(ranked_VE, self.groups, self.top_groups)
        ids_VK = ranked_VE.topk(self.top_k, dim=-1).indices
        return Assignments(token_V.repeat_interleave(self.top_k), ids_VK.flatten(), top_k=every_k)

    def weigh(self, scores_TE: Tensor, chosen: Assignments, tokens: int) -> Tensor:
        if chosen.top_k is None:
            weight_N = scores_TE[chosen.token_N, chosen.expert_N]
        else:  # the backward of `gather` needs no sort
            weight_N = scores_TE.gather(1, chosen.expert_N.view(-1, chosen.top_k)).flatten()
        if self.normalize:
            uniform_k = self.top_k if weight_N.numel() == tokens * self.top_k else None
            weight_N = share_of_token(weight_N, chosen.token_N, scores_TE.shape[0], uniform_k, self.eps)
        return weight_N if self.route_scale == 1 else weight_N * self.route_scale

    def _best_groups(self, ranked_VE: Tensor, groups: int, top_groups: int) -> Tensor:
        """Set what the experts outside of each token's best groups are ranked by to `group_fill`."""
        ranked_VGe = ranked_VE.unflatten(1, (groups, ranked_VE.shape[1] // groups))
        counted = 1 if self.group_score == "max" else min(2, ranked_VGe.shape[-1])
        score_VG = ranked_VGe.topk(counted, dim=-1).values.sum(-1)
        best_VG = torch.zeros_like(score_VG, dtype=torch.bool)
        best_VG.scatter_(1, score_VG.topk(top_groups, dim=-1).indices, True)
        return ranked_VGe.masked_fill(~best_VG.unsqueeze(-1), self.group_fill).flatten(1)


class NoisyTopKRouter(TopKRouter, kind="noisy_topk"):
    """Top-k with learned noise in training (Shazeer 2017, eq. 3-5): logits + softplus(x W_noise) * eps * noise_std.

    The noisy logits select and weigh; the decision reports the clean ones. `noise_weight` starts at zero, which gives
    the noise of every expert the standard deviation noise_std * ln 2. In evaluation there is no noise.
    """

    def __init__(self, weight_ED: nn.Parameter, top_k: int, *, noise_std: float, **settings: object) -> None:
        TopKRouter.__init__(self, weight_ED, top_k, **settings)
        self.noise_std = noise_std
        self.noise_weight = nn.Parameter(torch.zeros_like(weight_ED), requires_grad=weight_ED.requires_grad)

    @property
    def random(self) -> bool:
        return True

    def perturb(self, logits_TE: Tensor, x_TD: Tensor, generator: torch.Generator) -> Tensor:
        dtype = score_dtype(logits_TE)
        eps_TE = torch.empty_like(logits_TE, dtype=dtype).normal_(generator=generator)
        width_TE = F.softplus(F.linear(x_TD, self.noise_weight).to(dtype))
        return logits_TE.to(dtype) + width_TE * eps_TE * self.noise_std
