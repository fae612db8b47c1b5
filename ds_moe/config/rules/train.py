"""Rules about `train`, `data`, `monitor` and `checkpoint`, and those about `model` that need no model."""

from collections.abc import Iterator

from ds_moe.config.rules.gate import no_routing
from ds_moe.config.rules.rule import Complaint, Unused, needs, no_moe, value_of
from ds_moe.config.run import RunConfig, task_is, task_section
from ds_moe.config.sections import DIGITS, sources_of
from ds_moe.config.sources import HUB


def _no_files(config: RunConfig) -> str | None:
    sources = [*sources_of(config.data.train), *sources_of(config.data.eval)]
    if all(source.path == DIGITS for source in sources):
        return 'the data is "digits", which reads no files'
    own = [source for source in sources if source.path.startswith(HUB) or source.path.endswith(".tar")]
    if all(source in own or source.root is not None or source.path == DIGITS for source in sources):
        of = f"{own[0].path} brings its images" if own else "every source has a root of its own"
        return f"{of}, and no other file uses it"
    return None


def _no_eval(config: RunConfig) -> str | None:
    return None if config.data.eval else "data.eval is not set, so nothing is evaluated"


def _no_periodic_eval(config: RunConfig) -> str | None:
    reason = "train.eval_every is not set, and the evaluation at the end takes all of data.eval"
    return _no_eval(config) or (None if config.train.eval_every else reason)


def _no_answers(config: RunConfig) -> str | None:
    return _no_eval(config) or task_section(config).answers_nothing()


def _no_generation(config: RunConfig) -> str | None:
    return _no_answers(config) or (None if config.train.eval_generate else "train.eval_generate is false")


def _no_tensorboard(config: RunConfig) -> str | None:
    return None if config.monitor.tensorboard else "monitor.tensorboard is false"


def _no_samples(config: RunConfig) -> str | None:
    """A task that answers nothing shows what it chooses instead."""
    chooses = task_section(config).answers_nothing() is not None
    return _no_tensorboard(config) or _no_eval(config) or (None if chooses else _no_generation(config))


def _no_answers_to_learn(config: RunConfig) -> str | None:
    completions = task_is(config, "rl") and not config.data.eval
    return "task rl learns completions, not answers" if completions else None


def _nothing_to_offload(config: RunConfig) -> str | None:
    if not config.train.offload_activations:
        return None
    if task_is(config, "gate") and config.gate.stage == "supervised":
        return "gate.stage supervised runs the model without gradients, so its layers keep nothing"
    return needs("train.gradient_checkpointing", True)(config)


def _no_rows_of_samples(config: RunConfig) -> str | None:
    reason = "data.packing fills rows of train.tokens_per_micro_batch tokens"
    return reason if config.data.packing else None


def _no_grouping(config: RunConfig) -> str | None:
    alone = "train.global_batch_size is 1" if config.train.global_batch_size == 1 else None
    return _no_rows_of_samples(config) or alone


def _no_window(config: RunConfig) -> str | None:
    return needs("data.streaming", True)(config) or needs("data.shuffle", True)(config)


def _no_load(config: RunConfig) -> str | None:
    return no_moe(config) or no_routing(config)


UNUSED: dict[str, Unused] = {
    "data.root": _no_files,
    "data.video": _no_files,
    "data.train_on": _no_answers_to_learn,
    "data.length_grouping": _no_grouping,
    "data.shuffle_window_mb": _no_window,
    "train.micro_batch_size": _no_rows_of_samples,
    "train.tokens_per_micro_batch": needs("data.packing", True),
    "data.prefetch_factor": lambda c: None if c.data.num_workers else "data.num_workers is 0",
    "train.min_lr_ratio": needs("train.schedule", "cosine"),
    "train.muon_lr": needs("train.optimizer", "muon"),
    "train.muon_momentum": needs("train.optimizer", "muon"),
    "train.offload_activations": _nothing_to_offload,
    "train.eval_every": _no_eval,
    "train.eval_batch_size": _no_eval,
    "train.eval_samples": _no_periodic_eval,
    "train.eval_generate": _no_answers,
    "train.max_new_tokens": _no_generation,
    "monitor.dead_alarm_steps": _no_load,
    "monitor.heatmap_every": lambda c: _no_tensorboard(c) or _no_load(c),
    "monitor.sample_images": _no_samples,
}


def alternatives(config: RunConfig) -> Iterator[Complaint]:
    """Pairs of keys of which a run sets exactly one. Without these there is no run to look at."""
    for first, second in (("model.path", "model.preset"), ("train.steps", "train.epochs")):
        a, b = value_of(config, first), value_of(config, second)
        if a is None and b is None:
            yield first.partition(".")[0], f"neither {first} nor {second} is set; set one of them"
        elif a is not None and b is not None:
            later = first if config.at(first).startswith("override ") else second
            yield later, f"{first} is {a!r} and {second} is {b!r}; set only one of them"


def contradictions(config: RunConfig) -> Iterator[Complaint]:
    train = config.train
    if train.optimizer == "muon" and task_is(config, "gate"):
        text = "train.optimizer muon is for the hidden layers of a model, and task gate trains none"
        yield "train.optimizer", f"{text}; leave it out"
    if train.optimizer == "muon" and train.stage == "router_only":
        text = "train.optimizer muon leaves routers to AdamW, and train.stage router_only trains nothing else"
        yield "train.optimizer", f"{text}; leave it out"
    if train.patience is not None:
        if train.eval_every is None:
            yield "train.patience", "train.patience counts periodic evaluations; set train.eval_every (and data.eval)"
        elif train.eval_samples is not None:
            text = "train.patience compares evaluations of all of data.eval; remove train.eval_samples"
            yield "train.eval_samples", text
        elif config.checkpoint.every is not None:
            text = "checkpoint.every beside train.patience: the run keeps its best evaluation's checkpoint"
            yield "checkpoint.every", f"{text}; remove one of them"
    if too_long := warmup(config, train.steps):
        yield too_long
    for least, most in (("min_frames", "max_frames"), ("min_pixels", "max_pixels")):
        a, b = getattr(config.data.video, least), getattr(config.data.video, most)
        if a is not None and b is not None and a > b:
            text = f"data.video.{least} {a} is more than data.video.{most} {b}"
            yield f"data.video.{least}", f"{text}; lower it, or raise data.video.{most}"
    if config.data.packing and config.tokens_per_row < config.data.max_length:
        text = f"train.tokens_per_micro_batch {config.tokens_per_row} is less than data.max_length"
        fix = "a sample is never cut; make it as large, or lower data.max_length"
        yield "train.tokens_per_micro_batch", f"{text} {config.data.max_length}: {fix}"
    if config.data.packing and config.model.attention == "eager":
        text = "model.attention eager knows no bounds between the samples of a packed row"
        yield "model.attention", f"{text}; set it to sdpa (or flash_attention_2)"
    if config.model.attention == "flash_attention_2" and train.precision == "fp32":
        text = "model.attention flash_attention_2 has no fp32 kernels; set train.precision to bf16 or attention to sdpa"
        yield "model.attention", text


def warmup(config: RunConfig, steps: int | None) -> Complaint | None:
    """A warm-up that does not end within `steps` optimizer steps; None where their number is not known yet."""
    length = config.train.warmup_steps
    if steps is None or length < steps:
        return None
    return "train.warmup_steps", f"train.warmup_steps {length} takes all of the run's {steps} steps; make it smaller"
