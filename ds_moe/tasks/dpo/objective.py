"""Losses of preference tuning: pure functions of the log-probs of both answers.

With r = log p - log p_ref of an answer, summed over its tokens, and h = beta (r_chosen - r_rejected):

    dpo     -(1 - e) log sigmoid(h) - e log sigmoid(-h)                Rafailov 2023; e > 0: Mitchell 2023 (cDPO)
    robust  (-(1 - e) log sigmoid(h) + e log sigmoid(-h)) / (1 - 2 e)  Chowdhury 2024
    hinge   max(0, 1 - h)                                              Zhao 2023 (SLiC)
    ipo     (r_chosen / n_chosen - r_rejected / n_rejected - 1 / (2 beta))^2   Azar 2023, means over n tokens as in TRL
    simpo   dpo with h = beta (log p_chosen / n_chosen - log p_rejected / n_rejected) - margin   Meng 2024

e is `label_smoothing`. `rpo_alpha` adds -log p_chosen / n_chosen, the answer's mean cross entropy (Pang 2024).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_moe.config.tasks import DPOConfig


class Preference(NamedTuple):
    """What a loss makes of P pairs; the last dimension of size 2 has the preferred answer first."""

    loss_P: Tensor  # with grad
    reward_P2: Tensor  # implicit rewards, beta r; of simpo beta log p / n; without grad
    nll_P: Tensor  # mean cross entropy of the preferred answer's tokens, without grad


def preference(config: DPOConfig, logprob_P2: Tensor, reference_P2: Tensor | None, tokens_P2: Tensor) -> Preference:
    """The losses of pairs.

    Args:
        logprob_P2: summed log-probs of both answers, with grad.
        reference_P2: the same by the reference; not used by simpo, otherwise needed.
        tokens_P2: how many tokens each answer has; a filler has none.
    """
    tokens_P2 = tokens_P2.clamp_min(1)
    mean_P2 = logprob_P2 / tokens_P2
    if config.loss == "simpo":
        ratio_P2 = mean_P2
    else:
        assert reference_P2 is not None
        ratio_P2 = logprob_P2 - reference_P2
    compared_P2 = ratio_P2 / tokens_P2 if config.loss == "ipo" else ratio_P2
    loss_P = _loss(config, compared_P2[:, 0] - compared_P2[:, 1])
    nll_P = -mean_P2[:, 0]
    if config.rpo_alpha:
        loss_P = loss_P + config.rpo_alpha * nll_P
    return Preference(loss_P, config.beta * ratio_P2.detach(), nll_P.detach())


def _loss(config: DPOConfig, difference_P: Tensor) -> Tensor:
    beta, smoothing = config.beta, config.label_smoothing
    h_P = beta * difference_P
    if config.loss == "hinge":
        return torch.relu(1 - h_P)
    if config.loss == "ipo":
        return (difference_P - 1 / (2 * beta)).square()
    if config.loss == "simpo":
        h_P = h_P - config.margin
    agrees_P, flipped_P = F.logsigmoid(h_P), F.logsigmoid(-h_P)
    if config.loss == "robust":
        return (-(1 - smoothing) * agrees_P + smoothing * flipped_P) / (1 - 2 * smoothing)
    return -(1 - smoothing) * agrees_P - smoothing * flipped_P
