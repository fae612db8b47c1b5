"""Figures of an RL step: sums that can be added up over micro-batches and ranks, and their means at the end."""

import math

import torch
from torch import Tensor

from ds_moe.replay.objective import PolicyInputs
from ds_moe.replay.ratios import LOG_RATIO_LIMIT, kl_estimate, log_ratio

# The count that each sum is divided by.
_COUNTS = {
    "mismatch_k3": "comparable",  # KL(engine || old), Schulman's k3
    "mismatch_large": "tokens",  # share of tokens whose probability differs by more than a factor of two
    "engine_ratio": "comparable",  # p_old / p_engine
    "engine_ratio_square": "comparable",
    "dropped": "tokens",  # share of tokens that the correction gives weight 0
    "ratio": "tokens",  # live to old, before clipping
    "clip_fraction": "tokens",
    "entropy": "tokens",  # -log p of the sampled tokens, an estimate
    "kl": "tokens",  # to the reference
    "replayed": "tokens",  # share of tokens with a routing
    "gamma": "routed",
    "gamma_square": "routed",
    "reward": "rewards",
    "zero_advantage": "completions",  # share of completions whose advantage is 0
    "routers_changed": "routers",
    "tokens_changed": "tokens_compared",
}


@torch.no_grad()
def metrics(inputs: PolicyInputs, stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the completion tokens of a micro-batch, as fp64 scalars; `stats` are those of `policy_loss`.

    The keys depend on the objective alone, so that ranks may stack the sums and all-reduce them. They are fp64 because
    fp32 cannot hold the difference of sums that a standard deviation of 1e-3 around 1 is computed from.
    """
    mask_BS = inputs.mask_BS

    def total(values_BS: Tensor, within_BS: Tensor = mask_BS) -> Tensor:
        return torch.where(within_BS, values_BS.double(), 0).sum()

    mismatch_BS = log_ratio(inputs.old_BS, inputs.engine_BS, mask_BS).double()
    # Beyond the limit one token would outweigh all others. Servers write -9999 for a log-prob that is minus infinity.
    comparable_BS = mask_BS & (mismatch_BS.abs() < LOG_RATIO_LIMIT)
    sums = {
        "tokens": mask_BS.sum().double(),
        "comparable": comparable_BS.sum().double(),
        "mismatch_k3": total(
            kl_estimate(inputs.engine_BS.double(), inputs.old_BS.double(), mask_BS, "k3"), comparable_BS
        ),
        "mismatch_large": total(mismatch_BS.abs() > math.log(2)),
        "engine_ratio": total(mismatch_BS.exp(), comparable_BS),
        "engine_ratio_square": total((2 * mismatch_BS).exp(), comparable_BS),
        "dropped": total(stats["weight_BS"] == 0),
        "ratio": total(stats["ratio_BS"]),
        "clip_fraction": total(stats["clipped_BS"]),
        "entropy": total(-inputs.logprob_BS),
    }
    if "kl_BS" in stats:
        sums["kl"] = total(stats["kl_BS"])
    if inputs.routed_BS is not None:
        sums["replayed"] = total(inputs.routed_BS)
    if "gamma_BS" in stats and inputs.routed_BS is not None:
        routed_BS = inputs.routed_BS & mask_BS
        sums["routed"] = routed_BS.sum().double()
        sums["gamma"] = total(stats["gamma_BS"], routed_BS)
        sums["gamma_square"] = total(stats["gamma_BS"].double().square(), routed_BS)
    return sums


def routing_difference(live_ids_TLK: Tensor, replayed_ids_TLK: Tensor, mask_T: Tensor) -> dict[str, Tensor]:
    """Count the tokens, and the pairs of token and layer ("routers"), where live routers differ from the replay.

    Both selections are compared as sets of K experts, within the mask and where experts are replayed (not -1). The
    results are sums like those of `metrics`.
    """
    live_TLK, replayed_TLK = (ids.to(torch.int64).sort(-1).values for ids in (live_ids_TLK, replayed_ids_TLK))
    compared_TL = (replayed_TLK >= 0).all(-1) & mask_T.unsqueeze(1)
    changed_TL = (live_TLK != replayed_TLK).any(-1) & compared_TL
    return {
        "routers": compared_TL.sum().double(),
        "routers_changed": changed_TL.sum().double(),
        "tokens_compared": compared_TL.any(1).sum().double(),
        "tokens_changed": changed_TL.any(1).sum().double(),
    }


def means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Divide the sums of `metrics` and `routing_difference` by their counts; a mean whose count is 0 is left out.

    `ess` is the effective sample size of the weights p_old / p_engine as a share of the tokens, (sum w)^2 / (n sum w^2)
    (Kish 1965): 1 where engine and trainer agree. `incomparable_tokens` is their number, not a mean: the tokens that
    the figures of engine against trainer leave out, because the two differ by e^20 or more.
    """
    values = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
    found = {name: values[name] / values[n] for name, n in _COUNTS.items() if name in values and values[n] > 0}
    if values.get("tokens", 0) > 0:
        found["incomparable_tokens"] = values["tokens"] - values["comparable"]
    if "engine_ratio" in found:
        found["ess"] = found["engine_ratio"] ** 2 / found.pop("engine_ratio_square")
    if "gamma" in found:
        found["gamma_std"] = math.sqrt(max(found.pop("gamma_square") - found["gamma"] ** 2, 0.0))
    return found
