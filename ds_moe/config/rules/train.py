"""Rules about `train`, `data`, `monitor` and `checkpoint`, and those about `model` that need no model."""

from ds_moe.config.rules.gate import no_answers
from ds_moe.config.rules.rule import Complaint, Contradiction, Unused, needs, value_of
from ds_moe.config.run import RunConfig

# --- keys without effect


def _no_files(config: RunConfig) -> str | None:
    bundled = {config.data.train, config.data.eval} <= {"digits", None}
    return 'the data is "digits", which reads no files' if bundled else None


def _no_eval(config: RunConfig) -> str | None:
    return None if config.data.eval else "data.eval is not set, so nothing is evaluated"


def _no_periodic_eval(config: RunConfig) -> str | None:
    reason = "train.eval_every is not set, and the evaluation at the end takes all of data.eval"
    return _no_eval(config) or (None if config.train.eval_every else reason)


def _no_answers(config: RunConfig) -> str | None:
    return _no_eval(config) or no_answers(config)


def _no_generation(config: RunConfig) -> str | None:
    return _no_answers(config) or (None if config.train.eval_generate else "train.eval_generate is false")


def _no_experts(config: RunConfig) -> str | None:
    return None if config.moe else "there is no moe section"


def _no_tensorboard(config: RunConfig) -> str | None:
    return None if config.monitor.tensorboard else "monitor.tensorboard is false"


def _no_samples(config: RunConfig) -> str | None:
    """A supervised gate shows the adapters that it chooses, other runs the answers they generate."""
    return _no_tensorboard(config) or _no_eval(config) or (None if no_answers(config) else _no_generation(config))


UNUSED: dict[str, Unused] = {
    "data.root": _no_files,
    "data.length_grouping": lambda c: None if c.train.global_batch_size > 1 else "train.global_batch_size is 1",
    "data.prefetch_factor": lambda c: None if c.data.num_workers else "data.num_workers is 0",
    "train.min_lr_ratio": needs("train.schedule", "cosine"),
    "train.eval_every": _no_eval,
    "train.eval_batch_size": _no_eval,
    "train.eval_samples": _no_periodic_eval,
    "train.eval_generate": _no_answers,
    "train.max_new_tokens": _no_generation,
    "monitor.dead_alarm_steps": _no_experts,
    "monitor.heatmap_every": lambda c: _no_tensorboard(c) or _no_experts(c),
    "monitor.sample_images": _no_samples,
}


# --- contradictions


def _one_of(first: str, second: str) -> Contradiction:
    """A run file sets exactly one of these two keys of a section."""

    def rule(config: RunConfig) -> Complaint | None:
        a, b = value_of(config, first), value_of(config, second)
        if a is None and b is None:
            return first.partition(".")[0], f"neither {first} nor {second} is set; set one of them"
        if a is None or b is None:
            return None
        later = first if config.at(first).startswith("override ") else second
        return later, f"{first} is {a!r} and {second} is {b!r}; set only one of them"

    return rule


def _patience(config: RunConfig) -> Complaint | None:
    train = config.train
    if train.patience is None:
        return None
    if train.eval_every is None:
        return "train.patience", "train.patience counts periodic evaluations; set train.eval_every (and data.eval)"
    if train.eval_samples is not None:
        text = "train.patience compares evaluations of all of data.eval; remove train.eval_samples"
        return "train.eval_samples", text
    if config.checkpoint.every is None:
        return None
    text = "checkpoint.every beside train.patience: the run keeps its best evaluation's checkpoint; remove one of them"
    return "checkpoint.every", text


def warmup(config: RunConfig, steps: int | None) -> Complaint | None:
    """A warm-up that does not end within `steps` optimizer steps; None where their number is not known yet."""
    length = config.train.warmup_steps
    if steps is None or length < steps:
        return None
    return "train.warmup_steps", f"train.warmup_steps {length} takes all of the run's {steps} steps; make it smaller"


def _flash_attention(config: RunConfig) -> Complaint | None:
    if config.model.attention != "flash_attention_2" or config.train.precision != "fp32":
        return None
    text = "model.attention flash_attention_2 has no fp32 kernels; set train.precision to bf16 or attention to sdpa"
    return "model.attention", text


ALTERNATIVES: list[Contradiction] = [  # without these there is no run to look at: their complaints come first
    _one_of("model.path", "model.preset"),
    _one_of("train.steps", "train.epochs"),
]
CONTRADICTIONS: list[Contradiction] = [
    _patience,
    lambda config: warmup(config, config.train.steps),
    _flash_attention,
]
