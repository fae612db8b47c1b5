"""What every rule of a run file uses."""

from __future__ import annotations

from pydantic import BaseModel


def written(config: BaseModel, key: str) -> bool:
    """Whether the run file or an override sets this dotted key to something other than null."""
    name, _, rest = key.partition(".")
    value = getattr(config, name, None)  # not every kind of router has every key
    if name not in config.model_fields_set or value is None:
        return False
    return written(value, rest) if rest else True


Complaint = tuple[str, str | None]  # key, what is wrong; None where all is well
