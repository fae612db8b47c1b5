"""Rules about `task: rl`, its section `rl` and the replay of its rollouts' routing, `moe.replay`."""

from collections.abc import Iterator

from ds_moe.config.moe import MoEConfig, TopKRouting
from ds_moe.config.rules.rule import Complaint, Unused, needs, read_in
from ds_moe.config.run import RunConfig, task_is
from ds_moe.config.sections import has_digits, sources_of
from ds_moe.config.tasks import CORRECTION_BOUNDS


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
    "rl": read_in("rl"),
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


def contradictions(config: RunConfig) -> Iterator[Complaint]:
    reinforces, rl, moe = task_is(config, "rl"), config.rl, config.moe
    if moe is not None and moe.replay.enabled:
        router = moe.router
        if not reinforces:
            yield "moe.replay.enabled", "moe.replay.enabled needs task rl, whose rollouts bring a routing; remove it"
        elif not router.replays:
            yield "moe.router.kind", f"moe.replay.enabled needs moe.router.kind topk, which is {router.kind}"
        elif isinstance(router, TopKRouting) and router.scores == "sigmoid" and rl.router != "none":
            yield "rl.router", f"rl.router {rl.router} needs moe.router.scores softmax"
    elif reinforces and rl.router != "none":
        text = f"rl.router {rl.router} compares the routers at replayed experts; set moe.replay.enabled to true"
        yield "rl.router", text
    if not reinforces:
        return
    if moe is not None:
        yield from _other_routing(moe)
    if rl.router == "router_shift" and rl.updates_per_batch == 1:
        text = "rl.router router_shift needs rl.updates_per_batch above 1: before an update no router has shifted"
        yield "rl.router", text
    every, updates = config.train.eval_every, rl.updates_per_batch
    if config.train.patience is not None and every is not None and every % updates:
        text = f"train.patience keeps the weights of its best evaluation, and train.eval_every {every} evaluates"
        text += f" between checkpoints, of which rl.updates_per_batch {updates} allows one every {updates} steps"
        yield "train.eval_every", f"{text}; make it a multiple"
    if rl.correction != "none":
        default_low, default_high = CORRECTION_BOUNDS[rl.correction]
        low = default_low if rl.correction_low is None else rl.correction_low
        high = default_high if rl.correction_high is None else rl.correction_high
        if low >= high:
            key = "rl.correction_high" if rl.correction_low is None else "rl.correction_low"
            yield key, f"{key}: the bounds of {rl.correction} are {low} and {high}; the low one must be smaller"
    yield from _rollouts(config)


def _other_routing(moe: MoEConfig) -> Iterator[Complaint]:
    """The rollouts, and so the old policy, were routed without what a router does in training only."""
    names = ("expert_dropout", "jitter_noise", "capacity_factor")
    trained_only = [name for name in names if getattr(moe.router, name, None)]
    if moe.router.noisy:
        text = f"moe.router.kind {moe.router.kind} routes otherwise than the rollouts were; choose topk"
        yield "moe.router.kind", text
    elif trained_only:
        key = f"moe.router.{trained_only[0]}"
        yield key, f"{key} routes otherwise than the rollouts were; remove it"


def _rollouts(config: RunConfig) -> Iterator[Complaint]:
    train = config.train
    biases = [balance for balance in config.moe.balance if balance.kind == "loss_free"] if config.moe else []
    if config.rl.engine is not None:  # data.train holds prompts, see engine.py
        return
    if has_digits(config.data.train):
        text = "data.train is digits, but task rl reads a rollout file; ds-moe rollouts makes one"
        yield "data.train", text
    elif len(sources_of(config.data.train)) > 1 or any(one.epochs for one in sources_of(config.data.train)):
        text = "data.train: task rl without rl.engine reads one rollout file, whose groups belong together"
        yield "data.train", f"{text}; name one file, or put rollouts with groups of their own into one"
    elif train.epochs is None:  # else each rollout file is followed by another, and no step is known as the last
        return
    elif train.schedule != "constant":
        needed = f"train.schedule {train.schedule} needs train.steps under task rl"
        yield "train.schedule", f"{needed}: rollout files follow one another; set train.schedule to constant"
    elif any(bias.decay_from < 1 for bias in biases):
        text = "moe.balance loss_free decays within every rollout file under train.epochs; set its decay_from to 1"
        yield "moe.balance", text
