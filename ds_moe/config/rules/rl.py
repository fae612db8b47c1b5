"""Rules of a run file about `task: rl` and routing replay; `check.py` takes them into its tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_moe.config.moe import TopKRouting
from ds_moe.config.rules.rule import Complaint
from ds_moe.config.run import RunConfig, task_is

# --- keys without effect


def _no_rl(config: RunConfig) -> str | None:
    return None if task_is(config, "rl") else "task is sft"


def _rl_is(key: str, *values: Any) -> Callable[[RunConfig], str | None]:
    def rule(config: RunConfig) -> str | None:
        value = getattr(config.rl, key)
        return None if value in values else f"rl.{key} is {value}"

    return rule


def _no_second_update(config: RunConfig) -> str | None:
    reason = "rl.updates_per_batch is 1: the live policy is the old one, and every ratio is 1"
    return reason if config.rl.updates_per_batch == 1 else None


def _no_moved_bias(config: RunConfig) -> str | None:
    if not config.moe or not config.moe.replay.enabled:
        return "moe.replay.enabled is false"
    biased = any(balance.kind == "loss_free" for balance in config.moe.balance)
    return None if biased else "moe.balance lists no loss_free, so there is no bias"


RL_UNUSED: dict[str, Callable[[RunConfig], str | None]] = {
    "moe.replay.moves_bias": _no_moved_bias,
    "rl": _no_rl,
    "rl.clip_low": _no_second_update,
    "rl.clip_high": _no_second_update,
    "rl.gamma_floor": _rl_is("router", "router_shift"),
    "rl.gamma_place": _rl_is("router", "router_shift"),
    "rl.joint_lambda": _rl_is("router", "joint"),
    "rl.correction_low": _rl_is("correction", "tis", "mis", "icepop"),
    "rl.correction_high": _rl_is("correction", "tis", "mis", "icepop"),
    "rl.correction_level": _rl_is("correction", "tis", "mis", "icepop"),
    "rl.kl_kind": lambda c: None if c.rl.kl_weight else "rl.kl_weight is 0",
}


# --- contradictions


def _replay(config: RunConfig) -> Complaint:
    if not config.moe or not config.moe.replay.enabled:
        text = f"rl.router {config.rl.router} compares the routers at replayed experts; set moe.replay.enabled to true"
        return "rl.router", text if task_is(config, "rl") and config.rl.router != "none" else None
    if not task_is(config, "rl"):
        return "moe.replay.enabled", "moe.replay.enabled needs task rl, whose rollouts bring a routing; remove it"
    router, key = config.moe.router, "moe.router.kind"
    if not router.replays:
        return key, f"moe.replay.enabled needs moe.router.kind topk, which is {router.kind}"
    if isinstance(router, TopKRouting) and router.scores == "sigmoid" and config.rl.router != "none":
        return "rl.router", f"rl.router {config.rl.router} needs moe.router.scores softmax"
    return key, None


def _same_function(config: RunConfig) -> Complaint:
    """Whatever a router does in training only: rollouts were routed without it, and so is the old policy."""
    if not task_is(config, "rl") or config.moe is None:
        return "moe.router", None
    router = config.moe.router
    if router.noisy:
        text = f"moe.router.kind {router.kind} routes otherwise than the rollouts were; choose topk"
        return "moe.router.kind", text
    for name in ("expert_dropout", "jitter_noise", "capacity_factor"):
        if getattr(router, name, None):
            return f"moe.router.{name}", f"moe.router.{name} routes otherwise than the rollouts were; remove it"
    return "moe.router", None


def _first_update(config: RunConfig) -> Complaint:
    useless = task_is(config, "rl") and config.rl.router == "router_shift" and config.rl.updates_per_batch == 1
    text = "rl.router router_shift needs rl.updates_per_batch above 1: before an update no router has shifted"
    return "rl.router", text if useless else None


def _correction_bounds(config: RunConfig) -> Complaint:
    if not task_is(config, "rl") or config.rl.correction == "none":
        return "rl.correction", None
    from ds_moe.config.tasks import CORRECTION_BOUNDS  # torch: only where it is needed

    kind, written_low, written_high = config.rl.correction, config.rl.correction_low, config.rl.correction_high
    default_low, default_high = CORRECTION_BOUNDS[kind]
    low = default_low if written_low is None else written_low
    high = default_high if written_high is None else written_high
    key = "rl.correction_high" if written_low is None else "rl.correction_low"
    return key, None if low < high else f"{key}: the bounds of {kind} are {low} and {high}; the low one must be smaller"


def _rollouts(config: RunConfig) -> Complaint:
    if not task_is(config, "rl"):
        return "task", None
    if config.data.train == "digits":
        text = "data.train is digits, but task rl reads a rollout file; python -m ds_moe.tasks.rl.sample makes one"
        return "data.train", text
    text = f"train.schedule {config.train.schedule} needs train.steps under task rl: rollout files follow one another"
    endless = config.train.epochs is not None
    if endless and config.train.schedule != "constant":
        return "train.schedule", f"{text}; set train.schedule to constant"
    biases = [balance for balance in config.moe.balance if balance.kind == "loss_free"] if config.moe else []
    if endless and any(bias.decay_from < 1 for bias in biases):
        text = "moe.balance loss_free decays within every rollout file under train.epochs; set its decay_from to 1"
        return "moe.balance", text
    return "train.schedule", None


RL_CONTRADICTIONS: list[Callable[[RunConfig], Complaint]] = [
    _replay,
    _same_function,
    _first_update,
    _correction_bounds,
    _rollouts,
]
