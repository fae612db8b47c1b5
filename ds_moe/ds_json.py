"""The DeepSpeed JSON on its own: read with its lines, and keys refused that ds_moe cannot train with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_moe.ds_keys import ADAM_KEYS, FILLED, PASSED_ON, REFUSED, REFUSED_VALUES, STAGE_3_ONLY, ZERO_KEYS, ZERO_REFUSED
from ds_moe.errors import UserError
from ds_moe.lines import compose_lines, nearest

AUTO = "auto"


@dataclass
class Json:
    """A DeepSpeed JSON as written: its values and "file:line" of each dotted key."""

    file: str
    values: dict[str, Any]
    origins: dict[str, str]

    def at(self, key: str) -> str:
        return self.origins.get(key, self.file)


def read_json(path: str | Path) -> Json:
    """Read a DeepSpeed JSON; `UserError` with the line where it is none."""
    file = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot read the DeepSpeed JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: a DeepSpeed JSON is an object, this is a {type(values).__name__}")
    _, origins = compose_lines(text.replace("\t", " "), file)  # JSON is YAML but for tabs; also refuses duplicates
    return Json(file, values, origins)


def check_keys(source: Json) -> list[str]:
    """Complaints about keys that ds_moe does not pass on, and about values that it cannot train with."""
    values = source.values
    found = _check_names(source, "", values, FILLED + PASSED_ON, REFUSED)
    fp16 = section(values, "fp16").get("enabled", False)
    if fp16 not in (False, AUTO):
        found.append(f"{source.at('fp16.enabled')}: fp16.enabled is {fp16!r}; ds_moe trains in bf16 or fp32")
    for key in ("optimizer", "zero_optimization", "bf16", "fp16"):
        if not isinstance(values.get(key, {}), dict):
            found.append(f"{source.at(key)}: {key} is {values[key]!r}; must be an object")
    optimizer = section(values, "optimizer")
    found += _check_names(source, "optimizer", optimizer, ["type", "params"], {})
    found += _check_names(source, "optimizer.params", section(optimizer, "params"), ADAM_KEYS, {})
    kind = optimizer.get("type", "AdamW")
    if not isinstance(kind, str) or kind.lower() not in ("adam", "adamw"):
        found.append(f"{source.at('optimizer.type')}: optimizer.type is {kind!r}; must be 'AdamW' or 'Adam'")
    zero = section(values, "zero_optimization")
    found += _check_names(source, "zero_optimization", zero, ZERO_KEYS, ZERO_REFUSED)
    stage = zero.get("stage")
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        where = source.at("zero_optimization.stage" if "stage" in zero else "zero_optimization")
        return [*found, f"{where}: zero_optimization.stage is {stage!r}; must be 1, 2 or 3"]
    found += _refused_values(source)
    for key, value in zero.items():
        if stage < 3 and value != AUTO and (key.startswith("stage3_") or key in STAGE_3_ONLY):
            where = source.at(f"zero_optimization.{key}")
            found.append(f"{where}: zero_optimization.{key} would not be used: it needs stage 3, this is {stage}")
    return found


def _refused_values(source: Json) -> list[str]:
    found = []
    for key, (value, reason) in REFUSED_VALUES.items():
        *parents, name = key.split(".")
        holder = source.values
        for parent in parents:
            holder = section(holder, parent)
        if name in holder and holder[name] == value:
            found.append(f"{source.at(key)}: {key} {json.dumps(value)} is not supported: {reason}")
    return found


def _check_names(source: Json, parent: str, values: Any, known: Sequence[str], refused: dict[str, str]) -> list[str]:
    found = []
    for key in values:
        dotted = f"{parent}.{key}" if parent else key
        if key in refused:
            found.append(f"{source.at(dotted)}: {dotted} is not supported: {refused[key]}")
        elif key not in known:
            near = nearest(key, known)
            hint = f"did you mean {near}?" if near else f"keys here: {', '.join(sorted(known))}"
            found.append(f"{source.at(dotted)}: unknown key {dotted} ({hint})")
    return found


def section(values: dict[str, Any], key: str) -> dict[str, Any]:
    section = values.get(key)
    return section if isinstance(section, dict) else {}
