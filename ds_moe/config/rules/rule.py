"""What a rule of a run file is, and what all of them use."""

from collections.abc import Callable

from pydantic import BaseModel

from ds_moe.config.run import RunConfig, other_task, task_is

Complaint = tuple[str, str]  # the dotted key at fault, and what is wrong with it
Unused = Callable[[RunConfig], str | None]  # why a run would not use a key; None: it uses it


def written(config: BaseModel, key: str) -> bool:
    """Whether the run file or an override sets this dotted key to something other than null."""
    name, _, rest = key.partition(".")
    value = getattr(config, name, None)  # not every kind of router has every key
    if name not in config.model_fields_set or value is None:
        return False
    return written(value, rest) if rest else True


def value_of(config: RunConfig, key: str) -> object:
    """The value of a dotted key of sections that every run has."""
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def needs(key: str, *values: object) -> Unused:
    """The rule of a key that is used only where another one, `key`, has one of `values`."""

    def rule(config: RunConfig) -> str | None:
        value = value_of(config, key)
        return None if value in values else f"{key} is {value}"

    return rule


def in_task(name: str, rule: Unused) -> Unused:
    """`rule` for the runs of one task; those of another use the key, as far as it is concerned."""
    return lambda config: rule(config) if task_is(config, name) else None


def read_in(task: str) -> Unused:
    """The rule of a section that runs of one task read."""
    return lambda config: f"task is {other}" if (other := other_task(config, task)) else None


def no_moe(config: RunConfig) -> str | None:
    return None if config.moe else "there is no moe section"
