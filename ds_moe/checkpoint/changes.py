"""What a run file says otherwise than the checkpoint that it resumes."""

import json
from pathlib import Path
from typing import NamedTuple

from ds_moe.config.deepspeed_json import read_deepspeed
from ds_moe.config.run import RunConfig
from ds_moe.config.run_file import load_run
from ds_moe.config.tasks import TASK_SECTIONS
from ds_moe.config.yaml_lines import Plain, join
from ds_moe.errors import UserError
from ds_moe.models.lora import scaling

# How a run is written, watched and fed: that changes nothing it learns.
BOOKKEEPING = ("monitor", "checkpoint", "data.num_workers", "data.prefetch_factor", "data.prepared")
BOOKKEEPING += ("train.output_dir", "train.resume", "train.watchdog_s", "train.stop_within_s")
# What the weights of a checkpoint are multiplied into, and what they are given: with another value they are another
# model, or are asked about other inputs.
MEASURED = ("model.path", "model.preset", "lora.alpha", "lora.rslora", "moe.router", "moe.experts.apply_weight")
MEASURED += ("train.precision", "data.max_length", "data.train_on", "data.content_tokens", "data.video")
MEASURED += tuple(TASK_SECTIONS.keys() - {"rl"})  # rollouts are not evaluated
LONGEST = 120  # characters of a value


def changes(path: Path, config: RunConfig) -> list[str]:
    """What a run should say of its run file before it goes on from a checkpoint: a line for each changed key."""
    try:
        return [f"changed since the checkpoint: {key} {values}" for key, values in changed_keys(path, config).items()]
    except UserError as error:
        return [f"the run file was not compared with the checkpoint's: {error}"]


def changes_of_evaluation(path: Path, config: RunConfig) -> list[str]:
    """As `changes`, of what an evaluation of the checkpoint by this run file depends on.

    Raises:
        UserError: low-rank updates of another rank, or that would be multiplied by another factor than in training.
    """
    try:
        then, changed = load_run(path / "run.yaml"), changed_keys(path, config)
    except UserError as error:
        return [f"the run file was not compared with the checkpoint's: {error}"]
    if (found := other_updates(path, then, config)) is not None:
        raise UserError(f"{config.at(found.key)}: {found.text} ({found.fix})")
    return [
        f"changed since the checkpoint: {key} {values}"
        for key, values in changed.items()
        if any(f"{key}.".startswith(f"{one}.") for one in MEASURED)
    ]


class OtherUpdates(NamedTuple):
    """Why the low-rank updates of a checkpoint would be others in a run."""

    key: str
    text: str
    fix: str


def other_updates(path: Path, then: RunConfig, now: RunConfig) -> OtherUpdates | None:
    """What makes low-rank updates other ones than in the run `then` of a checkpoint; None: nothing, or only one of the
    two has any, which their tensors tell."""
    trained, asked = then.lora, now.lora
    if trained is None or asked is None:
        return None
    if trained.rank != asked.rank:
        text = f"lora.rank is {asked.rank}; the updates of {path} have rank {trained.rank}"
        return OtherUpdates("lora.rank", text, f"set it to {trained.rank}")
    if scaling(trained) == scaling(asked):
        return None
    rslora, before = (str(one.rslora).lower() for one in (asked, trained))
    text = f"lora.alpha {asked.alpha} and lora.rslora {rslora} multiply updates by {scaling(asked):g}"
    text += f"; those of {path} were trained with {scaling(trained):g}"
    return OtherUpdates("lora.alpha", text, f"set them to {trained.alpha} and {before}")


def changed_keys(path: Path, config: RunConfig) -> dict[str, str]:
    """Dotted key -> "old -> new" of every key that has another value than in the run file of a checkpoint.

    The keys of the DeepSpeed JSON stand below `deepspeed`; bookkeeping is left out.

    Raises:
        UserError: this version cannot read the run file of the checkpoint.
    """
    then, now = (_leaves(_tree(run)) for run in (load_run(path / "run.yaml"), config))
    return {
        key: f"{_written(then.get(key))} -> {_written(now.get(key))}"
        for key in [*now, *(key for key in then if key not in now)]
        if then.get(key) != now.get(key) and not any(f"{key}.".startswith(f"{one}.") for one in BOOKKEEPING)
    }


def _tree(run: RunConfig) -> dict[str, Plain]:
    """Every key with its value, used or not: one that is not written has the same default on both sides."""
    return run.model_dump(mode="json") | {"deepspeed": read_deepspeed(run).values}


def _leaves(value: Plain, key: str = "") -> dict[str, Plain]:
    """Dotted key -> value. Lists of sections are taken apart; lists of plain values are values, unless empty."""
    if value == []:
        return {}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        return {key: value}
    return {leaf: below for name, item in value.items() for leaf, below in _leaves(item, join(key, name)).items()}


def _written(value: Plain) -> str:
    """A value as a run file writes it."""
    text = "not set" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
