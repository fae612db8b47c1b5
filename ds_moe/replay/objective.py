"""Policy-gradient losses for reinforcement learning with replayed routing: pure functions of tensors and masks.

A new objective is one function that returns a `Surrogate`, and one line in `OBJECTIVES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ds_moe.replay import ratios
from ds_moe.replay.ratios import KL, Correction, Level

Aggregate = Literal["token_mean", "sequence_mean"]


class PolicyInputs(NamedTuple):
    """One micro-batch of B sequences of S tokens. Entry t belongs to token t (see `ratios.py`)."""

    logprob_BS: Tensor  # under the live policy, with grad
    old_BS: Tensor  # under the trainer's old policy, computed with replay
    engine_BS: Tensor  # as the inference engine reported them
    mask_BS: Tensor  # bool, completion tokens
    advantage: Tensor  # (B,) or (B, S)
    expert_BSLK: Tensor | None = None  # fp32 log-probabilities of the replayed experts in row t-1, live, with grad
    old_expert_BSLK: Tensor | None = None  # the same under the old policy
    routed_BS: Tensor | None = None  # bool, tokens that have a routing to replay
    reference_BS: Tensor | None = None  # under the reference policy of the KL term


@dataclass(frozen=True)
class Objective:
    """What `policy_loss` minimises. None means the default of the kind, in `OBJECTIVES` or `CORRECTION_BOUNDS`."""

    kind: Literal["grpo", "dapo", "gspo", "cispo"] = "grpo"
    clip_low: float | None = None  # ratios are clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float | None = None
    aggregate: Aggregate | None = None
    router: Literal["none", "router_shift", "joint"] = "none"
    gamma_floor: float = 0.8  # of router_shift
    gamma_place: Literal["before", "after"] = "before"  # gamma scales the ratio before it is clipped (RSPO), or after
    joint_lambda: float = 0.1  # weight of the mean expert log-ratio, with router joint
    correction: Correction = "none"
    correction_low: float | None = None
    correction_high: float | None = None
    correction_level: Level = "token"
    kl_weight: float = 0.0
    kl_kind: KL = "k3"


class Surrogate(NamedTuple):
    """What the objective maximises."""

    value_BS: Tensor  # at each token, with grad; 0 outside the mask
    ratio_BS: Tensor  # before clipping
    clipped_BS: Tensor  # bool, where the clip changed the value


class SurrogateInputs(NamedTuple):
    """What a surrogate is computed from. Every tensor is finite, and 0 outside the mask."""

    log_ratio_BS: Tensor  # live to old, with grad
    logprob_BS: Tensor  # live, with grad
    advantage_BS: Tensor
    mask_BS: Tensor


def policy_loss(
    objective: Objective, inputs: PolicyInputs, normalizer: float | Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch, a scalar with grad, and detached tensors (B, S) for `metrics.metrics`.

    Args:
        normalizer: divisor of the sum over tokens (`token_mean`) or over sequence means (`sequence_mean`). Pass the
            count of completion tokens, or of sequences, of the whole optimizer step on all ranks, divided by (world
            size * accumulation steps), over which DeepSpeed averages. Default: the count in this micro-batch, without
            sequences that have no completion token.

    Raises:
        ValueError: `inputs` lacks what the objective's router or KL term needs.
    """
    kind, mask_BS = OBJECTIVES[objective.kind], inputs.mask_BS
    live_BS, old_BS, gamma_BS = _with_router(objective, inputs)
    ratio_BS = ratios.log_ratio(live_BS, old_BS, mask_BS)
    if gamma_BS is not None and objective.gamma_place == "before":
        ratio_BS = ratio_BS + gamma_BS.log()
    advantage_BS = inputs.advantage if inputs.advantage.dim() == 2 else inputs.advantage.unsqueeze(1)
    given = SurrogateInputs(ratio_BS, torch.where(mask_BS, live_BS, 0), torch.where(mask_BS, advantage_BS, 0), mask_BS)
    low = kind.clip_low if objective.clip_low is None else objective.clip_low
    high = kind.clip_high if objective.clip_high is None else objective.clip_high
    surrogate = kind.surrogate(given, low, high)

    correction = objective.correction, objective.correction_low, objective.correction_high, objective.correction_level
    weight_BS = ratios.engine_weight(inputs.old_BS, inputs.engine_BS, mask_BS, *correction)
    loss_BS = -weight_BS * surrogate.value_BS
    stats = {"ratio_BS": surrogate.ratio_BS.detach(), "clipped_BS": surrogate.clipped_BS, "weight_BS": weight_BS}
    if gamma_BS is not None:
        stats["gamma_BS"] = gamma_BS
        if objective.gamma_place == "after":
            loss_BS = gamma_BS * loss_BS
    if objective.kl_weight:
        if inputs.reference_BS is None:
            raise ValueError(f"kl_weight: {objective.kl_weight} needs reference_BS; or use 0")
        kl_BS = ratios.kl_estimate(inputs.logprob_BS, inputs.reference_BS, mask_BS, objective.kl_kind)
        stats["kl_BS"] = kl_BS.detach()
        loss_BS = loss_BS + objective.kl_weight * kl_BS
    return _aggregate(loss_BS, mask_BS, objective.aggregate or kind.aggregate, normalizer), stats


def group_advantages(reward_B: Tensor, group_B: Tensor, normalize_std: bool = True) -> Tensor:
    """The advantage (B,) of each completion within its group: all completions of one prompt, which must all be here.

    It is `(r - mean) / std` (GRPO, Shao 2024, arXiv 2402.03300; sample standard deviation), or `r - mean` (Dr. GRPO,
    Liu 2025, arXiv 2503.20783). In a group of one completion or of equal rewards it is 0.
    """
    _, group_B = group_B.unique(return_inverse=True)
    count_G = torch.bincount(group_B)
    least_G = reward_B.new_full(count_G.shape, float("inf")).scatter_reduce(0, group_B, reward_B, "amin")
    # Subtract the group's least reward first. Equal rewards then are exact zeros, which no division can enlarge.
    reward_B = reward_B - least_G[group_B]
    mean_G = torch.zeros_like(least_G).index_add(0, group_B, reward_B) / count_G
    advantage_B = reward_B - mean_G[group_B]
    if not normalize_std:
        return advantage_B
    square_G = torch.zeros_like(mean_G).index_add(0, group_B, advantage_B.square())
    std_G = (square_G / (count_G - 1).clamp_min(1)).sqrt()
    return advantage_B / (std_G[group_B] + 1e-6)


def _token_clip(given: SurrogateInputs, low: float, high: float) -> Surrogate:
    """PPO's clipped surrogate of each token's ratio, `min(r A, clip(r) A)`."""
    return _clip(given.log_ratio_BS.exp(), given.advantage_BS, low, high)


def _sequence_clip(given: SurrogateInputs, low: float, high: float) -> Surrogate:
    """The same, where all tokens of a sequence have one ratio: the geometric mean over its tokens."""
    mean_B1 = ratios.sequence_mean(given.log_ratio_BS, given.mask_BS).unsqueeze(1)
    return _clip(mean_B1.exp().expand_as(given.log_ratio_BS), given.advantage_BS, low, high)


def _clipped_weight(given: SurrogateInputs, low: float, high: float) -> Surrogate:
    """`stop_gradient(clip(r)) A log p`: the clip bounds the weight of a token, and never removes its gradient."""
    ratio_BS = given.log_ratio_BS.exp()
    bounded_BS = ratio_BS.clamp(1 - low, 1 + high).detach()
    return Surrogate(bounded_BS * given.advantage_BS * given.logprob_BS, ratio_BS, bounded_BS != ratio_BS)


def _clip(ratio_BS: Tensor, advantage_BS: Tensor, low: float, high: float) -> Surrogate:
    free_BS, bounded_BS = ratio_BS * advantage_BS, ratio_BS.clamp(1 - low, 1 + high) * advantage_BS
    return Surrogate(torch.minimum(free_BS, bounded_BS), ratio_BS, bounded_BS < free_BS)


class Kind(NamedTuple):
    surrogate: Callable[[SurrogateInputs, float, float], Surrogate]
    clip_low: float
    clip_high: float
    aggregate: Aggregate


OBJECTIVES = {
    "grpo": Kind(_token_clip, 0.2, 0.2, "sequence_mean"),  # Shao 2024, DeepSeekMath, arXiv 2402.03300
    "dapo": Kind(_token_clip, 0.2, 0.28, "token_mean"),  # Yu 2025, arXiv 2503.14476
    "gspo": Kind(_sequence_clip, 3e-4, 4e-4, "sequence_mean"),  # Zheng 2025, arXiv 2507.18071
    "cispo": Kind(_clipped_weight, 1.0, 4.0, "token_mean"),  # MiniMax-M1 2025, arXiv 2506.13585: no lower bound
}


def _with_router(objective: Objective, inputs: PolicyInputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """The live and old log-probabilities (B, S) in this router mode, and gamma (B, S) with router_shift, else None."""
    if objective.router == "none":
        return inputs.logprob_BS, inputs.old_BS, None
    live_BSLK, old_BSLK, routed_BS = inputs.expert_BSLK, inputs.old_expert_BSLK, inputs.routed_BS
    if live_BSLK is None or old_BSLK is None or routed_BS is None:
        raise ValueError(f"router: {objective.router} needs expert_BSLK, old_expert_BSLK and routed_BS; or use none")
    routed_BS = routed_BS & inputs.mask_BS
    if objective.router == "router_shift":
        gamma_BS = ratios.router_shift(live_BSLK, old_BSLK, routed_BS, objective.gamma_floor)
        return inputs.logprob_BS, inputs.old_BS, gamma_BS
    live_BS = ratios.joint_logprob(inputs.logprob_BS, live_BSLK, routed_BS, objective.joint_lambda)
    return live_BS, ratios.joint_logprob(inputs.old_BS, old_BSLK, routed_BS, objective.joint_lambda), None


def _aggregate(loss_BS: Tensor, mask_BS: Tensor, how: Aggregate, normalizer: float | Tensor | None) -> Tensor:
    if how == "token_mean":
        total, count = torch.where(mask_BS, loss_BS, 0).sum(), mask_BS.sum()
    else:
        total, count = ratios.sequence_mean(loss_BS, mask_BS).sum(), mask_BS.any(1).sum()
    return total / (count.clamp_min(1) if normalizer is None else normalizer)
