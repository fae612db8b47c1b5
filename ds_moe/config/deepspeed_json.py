"""The DeepSpeed JSON on its own: read with the line of each key, and refused where ds_moe cannot train with it.

It is a file, by its path or the name of a shipped one, or the section `deepspeed` of the run file.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from os.path import isfile
from pathlib import Path
from typing import cast

from ds_moe.config import deepspeed_keys as keys
from ds_moe.config.run import RunConfig
from ds_moe.config.yaml_lines import Plain, compose_lines, join, nearest, read_text
from ds_moe.errors import UserError, shown

# Name -> file. In a checkout the folder is a link, in a wheel it holds the files.
SHIPPED = {file.stem: file for file in sorted((Path(__file__).resolve().parents[1] / "ds_configs").glob("*.json"))}
AUTO = "auto"
FITS: dict[str, Callable[[object], bool]] = {  # a key of `KINDS` -> whether a value is of this kind
    "an object": lambda value: isinstance(value, dict),
    "a number above 0": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value > 0,
    "true or false": lambda value: isinstance(value, bool),
}


@dataclass
class DeepSpeedJson:
    """A DeepSpeed JSON as written: its values, and where each dotted key of it was, as "file:line"."""

    values: dict[str, Plain]
    at: Callable[[str], str]
    noun: str = "the JSON"


def read_deepspeed(config: RunConfig) -> DeepSpeedJson:
    """What a run says about DeepSpeed; `UserError`, with the line, for a file that is no JSON object."""
    given = config.deepspeed
    if isinstance(given, str):
        return read_json(SHIPPED.get(given, given))
    values = cast(dict[str, Plain], given)
    return DeepSpeedJson(values, lambda key: f"{config.at(f'deepspeed.{key}')}: deepspeed", "that section")


def is_missing(config: RunConfig) -> bool:
    """Whether `deepspeed` is the path of no file, which reading the run file has complained about."""
    given = config.deepspeed
    return isinstance(given, str) and given not in SHIPPED and not isfile(given)


def json_text(config: RunConfig) -> str:
    """What a run says about DeepSpeed, as the text of a file."""
    given = config.deepspeed
    return Path(SHIPPED.get(given, given)).read_text() if isinstance(given, str) else json.dumps(given, indent=2) + "\n"


def read_json(path: str | Path) -> DeepSpeedJson:
    """A DeepSpeed JSON; `UserError`, with the line, for a file that cannot be read or is no JSON object."""
    file = str(path)
    text = read_text(Path(path), "DeepSpeed JSON")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
        raise UserError(f"{file}: not valid JSON ({str(error).partition(';')[0]})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: a DeepSpeed JSON is an object, this is a {type(values).__name__}")
    _, origins = compose_lines(text.replace("\t", " "), file)  # without tabs JSON is YAML; this refuses double keys too
    return DeepSpeedJson(values, lambda key: origins.get(key, file))


def check_keys(source: DeepSpeedJson) -> list[str]:
    """Complaints about keys that ds_moe does not pass on, and about values that it cannot train with."""
    values = source.values
    found = _check_names(source, "", values, keys.FILLED + keys.PASSED_ON, keys.REFUSED)
    fp16 = section(values, "fp16").get("enabled", False)
    if fp16 not in (False, AUTO):
        found.append(f"{source.at('fp16.enabled')}: fp16.enabled is {fp16!r}; ds_moe trains in bf16 or fp32")
    found += _wrong_kinds(source)
    found += _check_optimizer(source)
    zero = section(values, "zero_optimization")
    found += _check_names(source, "zero_optimization", zero, keys.ZERO_KEYS, keys.ZERO_REFUSED)
    stage = zero.get("stage")
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        where = source.at("zero_optimization.stage" if "stage" in zero else "zero_optimization")
        return [*found, f"{where}: zero_optimization.stage is {stage!r}; must be 1, 2 or 3"]
    found += _check_offload(source)
    for key, (value, reason) in keys.REFUSED_VALUES.items():
        if _value(source, key) == value:
            found.append(f"{source.at(key)}: {key} {json.dumps(value)} is not supported: {reason}")
    found += [f"{source.at(key)}: {key} is {shown(value)}; must be {what}" for key, value, what in _no_json(values)]
    for key, value in zero.items() if stage < 3 else ():
        dotted, names_stage_3 = f"zero_optimization.{key}", key.startswith("stage3_") and key not in keys.ANY_STAGE
        if (names_stage_3 or key in keys.STAGE_3_ONLY) and value != AUTO and not _off(dotted, value):
            found.append(f"{source.at(dotted)}: {dotted} would not be used: it needs stage 3, this is {stage}")
    return found


def _check_optimizer(source: DeepSpeedJson) -> list[str]:
    optimizer = section(source.values, "optimizer")
    found = _check_names(source, "optimizer", optimizer, ["type", "params"], {})
    found += _check_names(source, "optimizer.params", section(optimizer, "params"), keys.ADAM_KEYS, {})
    kind = optimizer.get("type", "AdamW")
    if isinstance(kind, str) and kind.lower() == "muon":
        text = "DeepSpeed's takes an expert's gate and up rows for one matrix and clips finished updates"
        fix = "write train.optimizer: muon in the run file, and 'AdamW' here, which trains the rest"
        return [*found, f"{source.at('optimizer.type')}: optimizer.type is {kind!r}: {text}; {fix}"]
    if not isinstance(kind, str) or kind.lower() not in ("adam", "adamw"):
        found.append(f"{source.at('optimizer.type')}: optimizer.type is {kind!r}; must be 'AdamW' or 'Adam'")
    return found


def _check_offload(source: DeepSpeedJson) -> list[str]:
    zero, found = section(source.values, "zero_optimization"), []
    for name in keys.OFFLOADS:
        key, offload = f"zero_optimization.{name}", section(zero, name)
        found += _check_names(source, key, offload, keys.OFFLOAD_KEYS, keys.OFFLOAD_REFUSED)
        if (device := offload.get("device", "none")) not in keys.DEVICES:
            devices = " or ".join(filter(None, keys.DEVICES))
            found.append(f"{source.at(key + '.device')}: {key}.device is {shown(device)}; must be {devices}")
    return found


def without_switched_off(values: dict[str, Plain]) -> dict[str, Plain]:
    """The keys of a JSON less those that ds_moe does not pass on, which are all switched off once it has been checked.

    The section of an offload to no device goes too.
    """
    kept = {key: value for key, value in values.items() if key not in keys.REFUSED}
    zero = section(values, "zero_optimization")
    dropped = {*keys.ZERO_REFUSED, *keys.ANY_STAGE}
    dropped |= {key for key in keys.OFFLOADS if _off(f"zero_optimization.{key}", zero.get(key))}
    kept["zero_optimization"] = {key: value for key, value in zero.items() if key not in dropped}
    return kept


def _off(key: str, value: Plain) -> bool:
    """Whether a value switches off what its key is for, so that the key says nothing."""
    if isinstance(value, dict):
        if key.rpartition(".")[2] in keys.OFFLOADS:
            return value.get("device", "none") in ("none", None)
        return value.get("enabled") is False or not any(value.values())
    offs = keys.OFF.get(key, keys.OFF_OTHERWISE)
    return value is None or any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in offs)


def _wrong_kinds(source: DeepSpeedJson) -> list[str]:
    found = []
    for kind, key in [(kind, key) for kind, names in keys.KINDS.items() for key in names.split()]:
        value = _value(source, key)
        if value is None and key not in (*keys.FILLED, "optimizer.params"):
            continue  # DeepSpeed reads null as if the key were not there
        if value != AUTO and not FITS[kind](value):
            found.append(f"{source.at(key)}: {key} is {shown(value)}; must be {kind}")
    return found


def _value(source: DeepSpeedJson, key: str) -> Plain:
    """The value of a dotted key; AUTO where the key is not written."""
    *parents, name = key.split(".")
    holder = source.values
    for parent in parents:
        holder = section(holder, parent)
    return holder.get(name, AUTO)


def _no_json(value: Plain, key: str = "") -> Iterator[tuple[str, Plain, str]]:
    """Dotted key of each value that JSON does not have, the value, and what it must be.

    Python reads NaN, Infinity and 1e999 in a file; a section of YAML may have dates and bytes too.
    """
    if isinstance(value, dict | list):
        for name, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _no_json(child, join(key, str(name)))
    elif isinstance(value, date | bytes):
        yield key, value, "text (in quotes), a number, true or false"
    elif isinstance(value, float) and not math.isfinite(value):
        yield key, value, "finite"


def _check_names(
    source: DeepSpeedJson, parent: str, values: dict[str, Plain], known: Sequence[str], refused: dict[str, str]
) -> list[str]:
    found = []
    for key in values:
        dotted = join(parent, key)
        if key in refused:
            if not _off(dotted, values[key]):
                found.append(f"{source.at(dotted)}: {dotted} is not supported: {refused[key]}")
        elif key not in known:
            near = nearest(key, known)
            hint = f"did you mean {near}?" if near else f"keys here: {', '.join(sorted(known))}"
            found.append(f"{source.at(dotted)}: unknown key {dotted} ({hint})")
    return found


def section(values: dict[str, Plain], key: str) -> dict[str, Plain]:
    """The object at `key`; an empty one where there is none."""
    found = values.get(key)
    return found if isinstance(found, dict) else {}
