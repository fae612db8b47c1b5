"""Log-probabilities of experts, and ratios, corrections and KL estimates made of their differences.

There are three policies: the *live* one, which is trained; the *old* one, which is the trainer's before the first
optimizer step on this batch, computed with replay; and the *engine's*, which sampled the tokens. Entry t of a (B, S)
tensor belongs to token t, which row t-1 of logits and routing predicts; entry 0 is not used. Where a mask is false, a
tensor may hold anything, even NaN: it is replaced before any arithmetic, so that it reaches neither a value nor a
gradient. A NaN at a completion token is an error and is not replaced.
"""

from typing import Literal

import torch
from torch import Tensor

from ds_moe.config.tasks import CORRECTION_BOUNDS

Correction = Literal["none", "tis", "mis", "icepop"]
Level = Literal["token", "sequence"]
KL = Literal["k1", "k2", "k3"]

LOG_RATIO_LIMIT = 20.0  # exp(20) is 5e8, far beyond any clip and far from overflow


def expert_logprobs(router_logits_TE: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The log of the router's softmax at the replayed experts, fp32 (T, K), and which of these there are, bool (T, K).

    Where an id is -1, the log-probability is 0 and the mask is false.
    """
    ids_TK = ids_TK.to(torch.int64)
    replayed_TK = ids_TK >= 0
    logits_TE = _masked(router_logits_TE.float(), replayed_TK.any(-1, keepdim=True))
    logprob_TK = logits_TE.log_softmax(-1).gather(-1, ids_TK.clamp_min(0))
    return _masked(logprob_TK, replayed_TK), replayed_TK


def log_ratio(new_BS: Tensor, old_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """log(new / old) where the mask is true, else 0. It is clamped to +-20, beyond which it has no gradient."""
    return (_masked(new_BS, mask_BS) - _masked(old_BS, mask_BS)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def sequence_mean(values_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Mean of each row over the true entries of the mask, (B,); 0 for a row without any."""
    return _masked(values_BS, mask_BS).sum(1) / mask_BS.sum(1).clamp_min(1)


def joint_logprob(logprob_BS: Tensor, expert_BSLK: Tensor, routed_BS: Tensor, weight: float) -> Tensor:
    """`log p(token) + weight * mean_{l,k} log p(expert)`, with grad to both; `log p(token)` if there is no routing.

    The difference of two of these is the joint log-ratio. It is a heuristic rather than an importance ratio, because
    top-k does not sample experts from the router's softmax. A sum in place of the mean would drown the token's own
    term: with 48 layers and top-8, a jitter of 0.02 in the logits gives the summed log-ratio a standard deviation of
    0.29, and the averaged one 0.0008.
    """
    return logprob_BS + weight * _masked(expert_BSLK, routed_BS[..., None, None]).mean((-2, -1))


@torch.no_grad()
def router_shift(expert_BSLK: Tensor, old_expert_BSLK: Tensor, routed_BS: Tensor, floor: float) -> Tensor:
    """The router-shift ratio of RSPO (Zhang 2025, arXiv 2510.23027), detached (B, S); 1 where there is no routing.

    `gamma = max(exp(-mean_{l,k} |log p(expert) - log p_old(expert)|), floor)` over the replayed experts. It lowers a
    token's ratio the more the router has moved since the rollout.
    """
    shift_BSLK = log_ratio(expert_BSLK, old_expert_BSLK, routed_BS[..., None, None]).abs()
    return shift_BSLK.mean((-2, -1)).neg().exp().clamp_min(floor)


@torch.no_grad()
def engine_weight(
    old_BS: Tensor,
    engine_BS: Tensor,
    mask_BS: Tensor,
    kind: Correction = "none",
    low: float | None = None,
    high: float | None = None,
    level: Level = "token",
) -> Tensor:
    """The weight (B, S), detached, that corrects for the engine rather than the old policy having sampled the tokens.

    It is made of w = p_old / p_engine of a token. With level `sequence`, w is the product over a completion's tokens,
    and all of them get the same weight. By kind, with the bounds of `CORRECTION_BOUNDS` where none are given:

    - `none`: 1.
    - `tis`: w clamped to the bounds; truncated importance sampling (Yao 2025, "Your efficient RL framework secretly
      brings you off-policy RL training").
    - `mis`: w between the bounds, else 0; masked importance sampling (Liu 2025, "When speed kills stability").
    - `icepop`: as `mis`, with a lower bound too; IcePop (Ling team 2025, Ring-1T, arXiv 2510.18855).
    """
    if kind == "none":
        return torch.ones_like(old_BS)
    default_low, default_high = CORRECTION_BOUNDS[kind]
    low = default_low if low is None else low
    high = default_high if high is None else high
    factor_BS = log_ratio(old_BS, engine_BS, mask_BS)
    if level == "sequence":
        total_B1 = factor_BS.sum(1, keepdim=True).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        factor_BS = total_B1.expand_as(factor_BS)
    weight_BS = factor_BS.exp()
    if kind == "tis":
        return weight_BS.clamp(low, high)
    return torch.where((low <= weight_BS) & (weight_BS <= high), weight_BS, 0)


def kl_estimate(policy_BS: Tensor, reference_BS: Tensor, mask_BS: Tensor, kind: KL = "k3") -> Tensor:
    """Estimate KL(policy || reference) at each token that the policy sampled, (B, S); 0 outside the mask.

    The estimators are Schulman's (2020, "Approximating KL divergence"), with d = log(reference / policy). k1 = -d is
    unbiased and of either sign; as a loss it has no effect in expectation, because its gradient is the score. k2 =
    d^2 / 2 is biased and has the gradient of the KL. k3 = exp(d) - 1 - d is unbiased and never negative.
    """
    d_BS = log_ratio(reference_BS, policy_BS, mask_BS)
    if kind == "k1":
        return -d_BS
    return d_BS.square() / 2 if kind == "k2" else d_BS.expm1() - d_BS


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    # A product would not do: 0 * NaN is NaN, in the value and in the gradient.
    return torch.where(mask, values, 0)
