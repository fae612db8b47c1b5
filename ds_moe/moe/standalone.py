"""Routers and losses for use without the trainer, as modules with familiar signatures.

They wrap the same code that the trainer uses. Nothing else in this package uses them. A whole layer for such use is
`MoELayer.build`.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ds_moe.moe.balance import AuxLoss, TokenStats, ZLoss
from ds_moe.moe.decision import RoutingDecision, count_experts
from ds_moe.moe.loss_free import update_biases
from ds_moe.moe.parts import BalanceSetting, bias_from, check_states, new_weight, router_from, whole


class ExpertRouter(nn.Module):
    """Top-k router of D x E with its own weight: `TopKRouter` or `NoisyTopKRouter`, whose arguments the others are.

    The weights of a token sum to 1.

    Args:
        gating_type: `softmax`, `sigmoid`, or `noisy_top_k` (softmax with learned noise in training).
        noise_std: factor of the learned noise (`noisy_top_k` only).
        loss_free: as in `MoELayer.build`: the rate of a bias that takes part in the choice and in no weight. It counts
            the tokens of each expert in training, and `end_step`, called once an optimizer step, moves it.

    Raises:
        TypeError: a size that is no whole number, a setting of another type.
        ValueError: an unknown gating type, `noise_std` without `noisy_top_k`, a setting out of its range in run files,
            or an impossible `top_k`.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        gating_type: Literal["softmax", "sigmoid", "noisy_top_k"] = "softmax",
        *,
        jitter_noise: float = 0.0,
        noise_std: float | None = None,
        temperature: float = 1.0,
        expert_dropout: float = 0.0,
        loss_free: BalanceSetting = None,
    ) -> None:
        super().__init__()
        whole(dim=dim, num_experts=num_experts, top_k=top_k)
        settings = {"jitter_noise": jitter_noise, "temperature": temperature, "expert_dropout": expert_dropout}
        if gating_type not in ("softmax", "sigmoid", "noisy_top_k"):
            raise ValueError(f"gating_type={gating_type!r} must be softmax, sigmoid or noisy_top_k")
        noisy = gating_type == "noisy_top_k"
        if noise_std is not None:
            if not noisy:
                raise ValueError(f"noise_std={noise_std} needs gating_type noisy_top_k, this is {gating_type}")
            settings["noise_std"] = noise_std
        kind, settings = ("noisy_topk", settings) if noisy else ("topk", settings | {"scores": gating_type})
        self.router = router_from(kind, new_weight(num_experts, dim), top_k, settings, normalizes=True)
        self.router.balancing = bias_from(num_experts, loss_free)
        self.aux = AuxLoss(weight=1.0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Route (B, S, D) or (T, D) hidden states.

        Args:
            mask: (B, S) or (T,), non-zero at real tokens; None: all are real.

        Returns:
            weights (B, S, K) or (T, K) fp32, with grad; indices of the same shape, int64; the unweighted aux loss (K
            when balanced). Slots without an expert (padding, expert dropout) are a token's last ones and have weight 0
            and index -1.
        """
        check_states(x, mask, self.router.weight)
        token_V = _real_tokens(mask)
        decision = self.router(x.reshape(-1, x.shape[-1]), token_V)
        weights_TK, indices_TK = _slots(decision, self.router.top_k)
        counts_E = count_experts(decision.expert_N, decision.logits_TE.shape[1])
        if self.training and self.router.balancing is not None:
            self.router.balancing.add(counts_E)
        loss = self.aux.loss(decision, TokenStats(token_V, 1, counts_E))
        shape = *x.shape[:-1], self.router.top_k
        return weights_TK.view(shape), indices_TK.view(shape), loss

    def end_step(self, progress: float = 0.0) -> None:
        """Move the loss-free bias, if there is one, after an optimizer step (collective under DDP).

        `progress` is the share of the run that is done, which `decay_from` refers to.
        """
        update_biases([] if self.router.balancing is None else [self.router.balancing], progress)


class ExpertChoiceRouter(nn.Module):
    """Experts choose tokens: `ExpertChoice` of D x E with its own weight. Not causal: for encoders.

    Each expert takes C = ceil(capacity_factor * T / E) tokens, which is `capacity_factor` experts a token on average.
    """

    def __init__(self, dim: int, num_experts: int, capacity_factor: float = 1.0) -> None:
        super().__init__()
        whole(dim=dim, num_experts=num_experts)
        settings = {"capacity_factor": capacity_factor}
        self.router = router_from("expert_choice", new_weight(num_experts, dim), 1, settings, normalizes=True)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Route (B, S, D) hidden states.

        Returns:
            fp32 weights (E, C), with grad; int64 token indices (E, C) into B * S; fp32 scores (B * S, E), with grad.
        """
        check_states(x_BSD, mask_BS, self.router.weight)
        decision = self.router(x_BSD.reshape(-1, x_BSD.shape[-1]), _real_tokens(mask_BS))
        experts = decision.scores_TE.shape[1]
        return decision.weight_N.view(experts, -1), decision.token_N.view(experts, -1), decision.scores_TE


class LoadBalancingLoss(nn.Module):
    """A balancer as a module: `AuxLoss` or `ZLoss` on a router's logits and its choice.

    Args:
        loss_type: `standard` (aux loss over the batch), `sequence` (over each sequence, averaged) or `z_loss`.
        loss_weight: factor; perfectly balanced, `standard` and `sequence` are loss_weight * K.
    """

    def __init__(
        self,
        num_experts: int,
        loss_type: Literal["standard", "z_loss", "sequence"] = "standard",
        loss_weight: float = 1e-2,
    ) -> None:
        super().__init__()
        aux, sequence = AuxLoss(loss_weight), AuxLoss(loss_weight, scope="sequence")
        kinds = {"standard": aux, "sequence": sequence, "z_loss": ZLoss(loss_weight)}
        if loss_type not in kinds:
            raise ValueError(f"loss_type={loss_type!r} must be one of {', '.join(kinds)}")
        self.num_experts = num_experts
        self.balancer = kinds[loss_type]

    def forward(self, logits_BSE: Tensor, indices_BSK: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """A scalar with grad.

        Args:
            logits_BSE: raw router logits; scores are their softmax.
            indices_BSK: the chosen experts, int64; -1 stands for no expert.
            mask_BS: non-zero at real tokens; None: all are real.
        """
        logits_TE = logits_BSE.reshape(-1, self.num_experts)
        chosen_TK = indices_BSK.reshape(logits_TE.shape[0], indices_BSK.shape[-1])
        kept_TK = chosen_TK >= 0
        if mask_BS is not None:
            kept_TK = kept_TK & mask_BS.reshape(-1, 1).bool()
        token_N, expert_N = kept_TK.nonzero()[:, 0], chosen_TK[kept_TK]
        scores_TE = logits_TE.float().softmax(-1)
        decision = RoutingDecision(logits_TE, scores_TE, token_N, expert_N, scores_TE[token_N, expert_N])
        stats = TokenStats(_real_tokens(mask_BS), logits_BSE.shape[0], count_experts(expert_N, self.num_experts))
        return self.balancer.loss(decision, stats)


def _real_tokens(mask_BS: Tensor | None) -> Tensor | None:
    """The indices of the real tokens among B * S; None: all are real."""
    return None if mask_BS is None else mask_BS.reshape(-1).nonzero().squeeze(1)


def _slots(decision: RoutingDecision, top_k: int) -> tuple[Tensor, Tensor]:
    """Turn the list of assignments, a token's beside each other, into weights (T, K) and indices (T, K)."""
    token_N, tokens = decision.token_N, decision.logits_TE.shape[0]
    counts_T = torch.bincount(token_N, minlength=tokens)
    slot_N = torch.arange(token_N.numel(), device=token_N.device) - (counts_T.cumsum(0) - counts_T)[token_N]
    weights_TK = decision.weight_N.new_zeros(tokens, top_k).index_put((token_N, slot_N), decision.weight_N)
    indices_TK = decision.expert_N.new_full((tokens, top_k), -1).index_put((token_N, slot_N), decision.expert_N)
    return weights_TK, indices_TK
