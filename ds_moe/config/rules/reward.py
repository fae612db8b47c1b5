"""Rules about `rl.reward`, the functions that judge what `rl.engine` samples."""

from collections.abc import Iterator

from ds_moe.config.rollout import OVERLONG
from ds_moe.config.rules.engine import engine_of
from ds_moe.config.rules.rule import Complaint, Unused
from ds_moe.config.run import RunConfig, task_is


def _no_engine(config: RunConfig) -> str | None:
    alone = task_is(config, "rl") and config.rl.engine is None
    return "there is no rl.engine, and the records of data.train bring their rewards" if alone else None


def _built_in(config: RunConfig) -> str | None:
    used = engine_of(config) is None or config.rl.reward.own_functions
    return None if used else "the rewards are built in, and need no processes"


def _no_buffer(config: RunConfig) -> str | None:
    used = engine_of(config) is None or config.rl.reward.overlong_buffer
    return None if used else "rl.reward.overlong_buffer is not set"


UNUSED: dict[str, Unused] = {
    "rl.reward": _no_engine,
    "rl.reward.function": lambda config: "rl.reward.functions lists them" if config.rl.reward.functions else None,
    **{f"rl.reward.{key}": _built_in for key in ("timeout_s", "processes", "memory_gb", "max_failed")},
    "rl.reward.overlong_penalty": _no_buffer,
}


def contradictions(config: RunConfig) -> Iterator[Complaint]:
    engine, reward = engine_of(config), config.rl.reward
    if engine is None:
        return
    names = [one.curve for one in reward.all]
    if twice := [name for number, name in enumerate(names) if name in names[:number] or name == OVERLONG]:
        text = "is what the penalty for length is called" if twice[0] == OVERLONG else "stands there twice"
        yield "rl.reward.functions", f"rl.reward.functions: the name {twice[0]} {text}; give one of them another 'name'"
    buffer = reward.overlong_buffer
    if buffer is not None and buffer > engine.max_new_tokens:
        text = f"rl.reward.overlong_buffer {buffer} is longer than rl.engine.max_new_tokens {engine.max_new_tokens}"
        yield "rl.reward.overlong_buffer", f"{text}; it is the end of these"
