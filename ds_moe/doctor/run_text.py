"""The text of the run file that `ds-moe init` writes: each key with its value, and behind it what it is for."""

import re

import yaml

from ds_moe.config.rules.model import expert_count
from ds_moe.doctor.fit import Fit, Job
from ds_moe.doctor.look import Looked
from ds_moe.doctor.plans import Setting

COMMENT_COLUMN = 44
EVAL_SAMPLES = 256  # of a longer held-out file in periodic evaluations
LONG_ANSWER = 256  # tokens; to generate and compare such answers takes long and says little
Section = list[tuple[str, object, str]]  # key, value, comment


def run_text(
    job: Job, settings: dict[str, Setting], chosen: Fit, output_dir: str, train: Looked, held_out: Looked | None
) -> str:
    """The sections of a run file. `settings` are the keys by which `chosen` was found."""
    steps_an_epoch = -(-train.records // chosen.global_batch)
    epochs = 3 if train.records < 10_000 else 2 if train.records < 100_000 else 1
    steps = epochs * steps_an_epoch
    often = min(500, round_down(max(1, steps // (2 if steps < 20 else 8))))
    sections = {
        "model": _model(job, settings, chosen),
        "data": _data(job, settings, train, held_out),
        "moe": _moe(job, chosen),
        "lora": _lora(job, chosen),
        "train": [
            ("output_dir", output_dir, "checkpoints and curves; a run that was stopped goes on from here"),
            ("epochs", epochs, f"of {steps_an_epoch:,} steps"),
            ("micro_batch_size", chosen.micro_batch, "samples of a rank at a time"),
            ("global_batch_size", chosen.global_batch, "samples of a step, over all ranks"),
            ("lr", 1e-4 if chosen.plan.lora else 1e-5, "peak, after the warm-up; then a cosine down to 0"),
            *([("warmup_steps", warmup, "in which lr rises from 0")] if (warmup := min(100, steps // 20)) else []),
            ("gradient_checkpointing", chosen.checkpointing, "true: less memory, slower"),
            *(_evaluation(held_out, often) if held_out else []),
        ],
        "checkpoint": [("every", often, "steps; the newest 2 are kept")],
    }
    lines = []
    for section, keys in sections.items():
        lines += [f"{section}:"] if keys else []
        lines += [_line(f"  {key}: {written(value)}", comment) for key, value, comment in keys]
    return "\n".join([*lines, f"deepspeed: {chosen.plan.engine}", ""])


def _line(text: str, comment: str) -> str:
    return f"{text:<{COMMENT_COLUMN}} # {comment}" if comment else text


def _model(job: Job, settings: dict[str, Setting], chosen: Fit) -> Section:
    frozen = settings.get("model.freeze") if not chosen.plan.lora else None
    comment = "the vision tower stays as it is; [] trains it too"
    return [("path", job.name, ""), *([("freeze", frozen, comment)] if frozen else [])]


def _data(job: Job, settings: dict[str, Setting], train: Looked, held_out: Looked | None) -> Section:
    files = [("train", train.file, f"{train.records:,} records")]
    files += [("eval", held_out.file, f"{held_out.records:,} records")] if held_out else []
    longest = f"tokens; the longest record that was looked at has {max(train.lengths):,}"
    keys = [*files, ("max_length", settings["data.max_length"], longest)]
    if "data.on_bad_record" in settings:
        keys.append(("on_bad_record", settings["data.on_bad_record"], "bad records are named and left out"))
    if train.images and not job.device.on_cpu:
        keys.append(("num_workers", 4, "processes a rank that decode images"))
    return keys


def _moe(job: Job, chosen: Fit) -> Section:
    if not expert_count(job.model):
        return []
    balance = ("balance", [{"kind": "aux", "weight": 1e-3}], "keeps experts evenly loaded")
    ep_size = ("ep_size", chosen.plan.ep_size, "ranks that share one copy of the experts")
    return [ep_size] if chosen.plan.lora else [ep_size, balance]


def _lora(job: Job, chosen: Fit) -> Section:
    rank = chosen.plan.lora
    if not rank:
        return []
    experts = [("experts", True, "of every expert too, beside attention")] if expert_count(job.model) else []
    return [
        ("rank", rank, "the model is frozen, low-rank updates are trained"),
        ("alpha", 2 * rank, "updates are scaled by alpha / rank"),
        *experts,
    ]


def _evaluation(held_out: Looked, often: int) -> Section:
    keys: Section = [("eval_every", often, "steps")]
    if held_out.records > EVAL_SAMPLES:
        keys.append(("eval_samples", EVAL_SAMPLES, f"of {held_out.records:,}; the evaluation at the end takes all"))
    if held_out.answer > LONG_ANSWER:
        keys.append(("eval_generate", False, "no exact matches: answers are long"))
    else:
        keys.append(("max_new_tokens", -(-held_out.answer * 5 // 4 // 8) * 8, "of a generated answer"))
    return keys


def written(value: object) -> str:
    """A value as YAML on one line; a float as people write learning rates, 1e-5."""
    if isinstance(value, float):
        return re.sub(r"\.?0*e([+-])0*", r"e\1", f"{value:e}")
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()


def round_down(number: int) -> int:
    """The largest of 1, 2, 5, 10, 20, 50, ... that is not above `number`."""
    power = 10 ** (len(str(number)) - 1)
    return max(first * power for first in (1, 2, 5) if first * power <= number)
