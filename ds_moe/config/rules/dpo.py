"""Rules about `task: dpo` and its section `dpo`."""

from collections.abc import Iterator

from ds_moe.config.rules.data import shares
from ds_moe.config.rules.lora import base_changes
from ds_moe.config.rules.rule import Complaint, Unused, in_task, needs, read_in
from ds_moe.config.run import RunConfig, task_is
from ds_moe.config.sections import has_digits


def reference_of(config: RunConfig) -> str:
    """What the policy is compared with: "base" (the model without its updates), "stored" log-probs, or "none"."""
    if config.dpo.loss == "simpo":
        return "none"
    return config.dpo.reference or ("stored" if base_changes(config) else "base")


def replays_experts(config: RunConfig) -> str | None:
    """Why the policy cannot be given the experts of the reference; None: it can."""
    if config.moe is None:
        return "there is no moe section"
    router = config.moe.router
    if not router.replays:
        return f"moe.router.kind is {router.kind}"
    for name in ("expert_dropout", "jitter_noise", "capacity_factor"):
        if getattr(router, name, None):
            return f"moe.router.{name} routes otherwise in training"
    return None


def _no_reference(config: RunConfig) -> str | None:
    return "dpo.loss simpo has no reference" if reference_of(config) == "none" else None


UNUSED: dict[str, Unused] = {
    "dpo": read_in("dpo"),
    "dpo.label_smoothing": in_task("dpo", needs("dpo.loss", "dpo", "robust", "simpo")),
    "dpo.margin": in_task("dpo", needs("dpo.loss", "simpo")),
    "dpo.reference": in_task("dpo", _no_reference),
    "dpo.reference_dir": in_task(
        "dpo",
        lambda config: (
            _no_reference(config)
            or (
                None
                if reference_of(config) == "stored"
                else "the reference is the base, whose log-probs are not stored"
            )
        ),
    ),
    "dpo.replay_reference": in_task("dpo", _no_reference),
}


def contradictions(config: RunConfig) -> Iterator[Complaint]:
    if not task_is(config, "dpo"):
        return
    dpo, data = config.dpo, config.data
    if has_digits(data.train) or has_digits(data.eval):
        key = "data.train" if has_digits(data.train) else "data.eval"
        yield key, f'{key} is "digits", whose records have one answer; give a file with pairs'
    if shares(config) and reference_of(config) == "stored":
        text = "log-probs of a stored reference are computed in a pass over all pairs, and an epoch of these sources"
        yield "data.train", f"data.train: {text} is another; remove weight, epochs and data.mixture.temperature"
    if dpo.loss == "robust" and not dpo.label_smoothing:
        yield "dpo.loss", "dpo.loss robust with dpo.label_smoothing 0 is dpo; set the share of swapped pairs"
    if dpo.reference == "base" and (reason := base_changes(config)):
        text = f"dpo.reference base is the model without its low-rank updates, but {reason}; write stored"
        yield "dpo.reference", text
    if dpo.replay_reference and _no_reference(config) is None:
        if reason := replays_experts(config):
            yield (
                "dpo.replay_reference",
                f"dpo.replay_reference cannot give the policy the reference's experts: {reason}",
            )
        elif reference_of(config) != "base":
            text = "dpo.replay_reference needs dpo.reference base: stored log-probs come without a routing"
            yield "dpo.replay_reference", text
