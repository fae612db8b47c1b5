"""Rules about `task: rl`, its section `rl` and the replay of its rollouts' routing, `moe.replay`."""

from ds_moe.config.moe import TopKRouting
from ds_moe.config.rules.rule import Complaint, Contradiction, Unused, in_task, needs
from ds_moe.config.run import RunConfig, other_task, task_is
from ds_moe.config.tasks import CORRECTION_BOUNDS

# --- keys without effect


def _no_rl(config: RunConfig) -> str | None:
    other = other_task(config, "rl")
    return f"task is {other}" if other else None


def _no_second_update(config: RunConfig) -> str | None:
    reason = "rl.updates_per_batch is 1: the live policy is the old one, and every ratio is 1"
    return reason if config.rl.updates_per_batch == 1 else None


def _no_moved_bias(config: RunConfig) -> str | None:
    if not config.moe or not config.moe.replay.enabled:
        return "moe.replay.enabled is false"
    biased = any(balance.kind == "loss_free" for balance in config.moe.balance)
    return None if biased else "moe.balance lists no loss_free, so there is no bias"


UNUSED: dict[str, Unused] = {
    "moe.replay.moves_bias": _no_moved_bias,
    "rl": _no_rl,
    "rl.clip_low": _no_second_update,
    "rl.clip_high": _no_second_update,
    "rl.gamma_floor": needs("rl.router", "router_shift"),
    "rl.gamma_place": needs("rl.router", "router_shift"),
    "rl.joint_lambda": needs("rl.router", "joint"),
    "rl.correction_low": needs("rl.correction", *CORRECTION_BOUNDS),
    "rl.correction_high": needs("rl.correction", *CORRECTION_BOUNDS),
    "rl.correction_level": needs("rl.correction", *CORRECTION_BOUNDS),
    "rl.kl_kind": lambda config: None if config.rl.kl_weight else "rl.kl_weight is 0",
}


# --- contradictions


def _replay(config: RunConfig) -> Complaint | None:
    if not config.moe or not config.moe.replay.enabled:
        if not task_is(config, "rl") or config.rl.router == "none":
            return None
        text = f"rl.router {config.rl.router} compares the routers at replayed experts; set moe.replay.enabled to true"
        return "rl.router", text
    if not task_is(config, "rl"):
        return "moe.replay.enabled", "moe.replay.enabled needs task rl, whose rollouts bring a routing; remove it"
    router = config.moe.router
    if not router.replays:
        return "moe.router.kind", f"moe.replay.enabled needs moe.router.kind topk, which is {router.kind}"
    if isinstance(router, TopKRouting) and router.scores == "sigmoid" and config.rl.router != "none":
        return "rl.router", f"rl.router {config.rl.router} needs moe.router.scores softmax"
    return None


def _same_function(config: RunConfig) -> Complaint | None:
    """The rollouts, and so the old policy, were routed without what a router does in training only."""
    if config.moe is None:
        return None
    router = config.moe.router
    if router.noisy:
        text = f"moe.router.kind {router.kind} routes otherwise than the rollouts were; choose topk"
        return "moe.router.kind", text
    for name in ("expert_dropout", "jitter_noise", "capacity_factor"):
        if getattr(router, name, None):
            return f"moe.router.{name}", f"moe.router.{name} routes otherwise than the rollouts were; remove it"
    return None


def _first_update(config: RunConfig) -> Complaint | None:
    if config.rl.router != "router_shift" or config.rl.updates_per_batch > 1:
        return None
    text = "rl.router router_shift needs rl.updates_per_batch above 1: before an update no router has shifted"
    return "rl.router", text


def _correction_bounds(config: RunConfig) -> Complaint | None:
    kind, written_low, written_high = config.rl.correction, config.rl.correction_low, config.rl.correction_high
    if kind == "none":
        return None
    default_low, default_high = CORRECTION_BOUNDS[kind]
    low = default_low if written_low is None else written_low
    high = default_high if written_high is None else written_high
    if low < high:
        return None
    key = "rl.correction_high" if written_low is None else "rl.correction_low"
    return key, f"{key}: the bounds of {kind} are {low} and {high}; the low one must be smaller"


def _rollouts(config: RunConfig) -> Complaint | None:
    if config.data.train == "digits":
        text = "data.train is digits, but task rl reads a rollout file; python -m ds_moe.tasks.rl.sample makes one"
        return "data.train", text
    if config.train.epochs is None:  # else each rollout file is followed by another, and no step is known as the last
        return None
    if config.train.schedule != "constant":
        needed = f"train.schedule {config.train.schedule} needs train.steps under task rl"
        return "train.schedule", f"{needed}: rollout files follow one another; set train.schedule to constant"
    biases = [balance for balance in config.moe.balance if balance.kind == "loss_free"] if config.moe else []
    if any(bias.decay_from < 1 for bias in biases):
        text = "moe.balance loss_free decays within every rollout file under train.epochs; set its decay_from to 1"
        return "moe.balance", text
    return None


CONTRADICTIONS: list[Contradiction] = [
    _replay,
    in_task("rl", _same_function),
    in_task("rl", _first_update),
    in_task("rl", _correction_bounds),
    in_task("rl", _rollouts),
]
