"""Rules about `rl.engine`, the servers or the model of this machine that sample a run's completions."""

from collections.abc import Iterator
from pathlib import Path

from ds_moe.config.rollout import EngineConfig
from ds_moe.config.rules.lora import base_changes
from ds_moe.config.rules.rule import Complaint, Unused
from ds_moe.config.run import RunConfig, task_is


def engine_of(config: RunConfig) -> EngineConfig | None:
    """What samples the rollouts of a run; None: a file brings them, or the task has none."""
    return config.rl.engine if task_is(config, "rl") else None


def steps_of_round(config: RunConfig, engine: EngineConfig) -> int:
    """Optimizer steps that a full round of rollouts takes."""
    return -(-engine.prompts * engine.completions // config.train.global_batch_size)


def keeps_start(config: RunConfig) -> bool:
    """Whether a run keeps a copy of its first weights: for rl.kl_weight, where it trains more than LoRA."""
    return engine_of(config) is not None and config.rl.kl_weight > 0 and base_changes(config) is not None


def _no_server(config: RunConfig) -> str | None:
    engine = engine_of(config)
    return "rl.engine.kind is local" if engine is not None and engine.kind == "local" else None


UNUSED: dict[str, Unused] = {
    f"rl.engine.{key}": _no_server for key in ("urls", "model", "key_from", "in_flight", "wait_s")
}


def contradictions(config: RunConfig) -> Iterator[Complaint]:
    engine, train = engine_of(config), config.train
    if engine is None:
        return
    if engine.kind != "local" and not engine.urls:
        text = f"rl.engine.kind {engine.kind} needs rl.engine.urls, such as [http://127.0.0.1:8000]; local needs none"
        yield "rl.engine", text
    samples, size = engine.prompts * engine.completions, train.global_batch_size
    if samples % size:
        text = f"rl.engine.prompts {engine.prompts} x rl.engine.completions {engine.completions} = {samples} is no"
        yield "rl.engine.prompts", f"{text} multiple of train.global_batch_size {size}; make it one"
    elif steps_of_round(config, engine) % config.rl.updates_per_batch:
        text = f"rl.updates_per_batch {config.rl.updates_per_batch} does not divide the {samples // size} steps of a"
        yield "rl.updates_per_batch", f"{text} round (rl.engine.prompts x completions / train.global_batch_size)"
    if train.epochs is not None:
        yield "train.epochs", "train.epochs counts passes over a file, rl.engine makes new rollouts; set train.steps"
    if engine.lag and config.rl.correction == "none":
        text = f"rl.engine.lag {engine.lag} trains on completions of older weights; set rl.correction to tis, mis or"
        yield "rl.engine.lag", f"{text} icepop"
    checkpoints = Path(train.output_dir, "checkpoints").resolve()
    if engine.weights_dir is not None and Path(engine.weights_dir).resolve().is_relative_to(checkpoints):
        text = f"rl.engine.weights_dir {engine.weights_dir} lies in the folder of checkpoints, and older weights are"
        yield "rl.engine.weights_dir", f"{text} removed; choose another"
    if engine.max_new_tokens >= config.data.max_length:
        text = f"rl.engine.max_new_tokens {engine.max_new_tokens} leaves no room for a prompt in data.max_length"
        yield "rl.engine.max_new_tokens", f"{text} {config.data.max_length}; raise data.max_length, or lower it"
