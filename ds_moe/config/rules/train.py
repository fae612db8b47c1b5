"""Rules of a run file about `train`, `data`, `monitor` and `checkpoint`."""

from __future__ import annotations

from collections.abc import Callable

from ds_moe.config.rules.gate import no_answers
from ds_moe.config.rules.rule import Complaint
from ds_moe.config.run import RunConfig


def _no_eval(config: RunConfig) -> str | None:
    return None if config.data.eval else "data.eval is not set, so nothing is evaluated"


def _no_generation(config: RunConfig) -> str | None:
    return _no_answers(config) or (None if config.train.eval_generate else "train.eval_generate is false")


def _no_answers(config: RunConfig) -> str | None:
    return _no_eval(config) or no_answers(config)


def _no_samples(config: RunConfig) -> str | None:
    """A supervised gate shows the adapters that it chooses, other runs what was generated."""
    return _no_tensorboard(config) or _no_eval(config) or (None if no_answers(config) else _no_generation(config))


def _no_periodic_eval(config: RunConfig) -> str | None:
    reason = "train.eval_every is not set, and the evaluation at the end takes all of data.eval"
    return _no_eval(config) or (None if config.train.eval_every else reason)


def _no_tensorboard(config: RunConfig) -> str | None:
    return None if config.monitor.tensorboard else "monitor.tensorboard is false"


def _no_files(config: RunConfig) -> str | None:
    bundled = {config.data.train, config.data.eval} <= {"digits", None}
    return 'the data is "digits", which reads no files' if bundled else None


def _one_of(first: str, second: str) -> Callable[[RunConfig], Complaint]:
    section, first_name, second_name = first.partition(".")[0], first.rpartition(".")[2], second.rpartition(".")[2]

    def rule(config: RunConfig) -> Complaint:
        a, b = getattr(getattr(config, section), first_name), getattr(getattr(config, section), second_name)
        if a is None and b is None:
            return section, f"neither {first} nor {second} is set; set one of them"
        if a is not None and b is not None:
            later = first if config.at(first).startswith("override ") else second
            return later, f"{first} is {a!r} and {second} is {b!r}; set only one of them"
        return section, None

    return rule


def _stage(config: RunConfig) -> Complaint:
    if config.train.stage == "all":
        return "train.stage", None
    if config.moe is None:
        return "train.stage", "train.stage router_only needs routers, and there is no moe section"
    kind = config.moe.router.kind
    text = f"train.stage router_only would train nothing: moe.router.kind {kind} learns nothing"
    return "train.stage", None if config.moe.router.learns else text


def _warmup(config: RunConfig, steps: int | None) -> Complaint:
    warmup = config.train.warmup_steps
    text = f"train.warmup_steps {warmup} takes all of the run's {steps} steps; make it smaller"
    return "train.warmup_steps", text if steps is not None and warmup >= steps else None


def _flash_attention(config: RunConfig) -> Complaint:
    wrong = config.model.attention == "flash_attention_2" and config.train.precision == "fp32"
    text = "model.attention flash_attention_2 has no fp32 kernels; set train.precision to bf16 or attention to sdpa"
    return "model.attention", text if wrong else None


def _patience(config: RunConfig) -> Complaint:
    if config.train.patience is None:
        return "train.patience", None
    if config.train.eval_every is None:
        return "train.patience", "train.patience counts periodic evaluations; set train.eval_every (and data.eval)"
    if config.train.eval_samples is not None:
        text = "train.patience compares evaluations of all of data.eval; remove train.eval_samples"
        return "train.eval_samples", text
    text = "checkpoint.every beside train.patience: the run keeps its best evaluation's checkpoint; remove one of them"
    return "checkpoint.every", text if config.checkpoint.every is not None else None
