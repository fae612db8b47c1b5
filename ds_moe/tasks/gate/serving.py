"""The routing manifest: a JSON file that tells an inference engine which adapter serves which request.

    {"format": 1,
     "adapters": [{"lora_name": "ocr", "lora_int_id": 1, "lora_path": "/runs/ocr"}],
     "requests": [{"request": "a.jsonl:7", "lora_name": "ocr", "lora_int_id": 1, "probability": 0.93}]}

vLLM's `LoRARequest(**entry)` takes an entry of `adapters`, and its server takes `lora_name=lora_path` after
`--lora-modules`. vLLM counts ids from 1, because 0 is the base model. It splits the server's form at "=" and ",", so
these are not allowed in names; a path that contains one needs the server's JSON form.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_moe.errors import UserError, shown

FORMAT = 1
_KINDS = {str: "a text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}
_TOP = {"format": int, "adapters": list, "requests": list}
_ADAPTER = {"lora_name": str, "lora_int_id": int, "lora_path": str}
_REQUEST = {"request": str, "lora_name": str, "lora_int_id": int, "probability": float}


@dataclass(frozen=True)
class Route:
    """The gate's first choice for one request."""

    where: str  # the request: file:line
    adapter: str
    probability: float  # that the gate gives to `adapter`


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read. Its fields are the arguments of `write_manifest`."""

    routes: tuple[Route, ...]  # in the order of the requests
    adapters: dict[str, Path]  # folders by name; ids count from 1 in this order


def write_manifest(path: Path, routes: Iterable[Route], adapters: dict[str, Path]) -> None:
    """Write the manifest completely or not at all. Relative folders of adapters become absolute.

    Raises UserError for what `read_manifest` would refuse; an existing file then stays unchanged.
    """
    ids = {name: number for number, name in enumerate(adapters, 1)}
    requests = []
    for route in routes:
        entry = {"request": route.where, "lora_name": route.adapter, "lora_int_id": ids.get(route.adapter, 0)}
        requests.append(entry | {"probability": float(route.probability)})
    entries = [
        {"lora_name": name, "lora_int_id": ids[name], "lora_path": str(Path(folder).absolute())}
        for name, folder in adapters.items()
    ]
    values = {"format": FORMAT, "adapters": entries, "requests": requests}
    _validated(values, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest. Raises UserError, naming the key, if an engine could not serve it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot read the routing manifest ({error})") from error
    return _validated(values, str(path))


def _validated(values: object, file: str) -> Manifest:
    """Make a manifest of JSON values, or raise UserError."""
    if isinstance(values, dict) and values.get("format", FORMAT) != FORMAT:  # first: another format has other keys
        raise UserError(
            f"{file}: format={shown(values['format'])}, this version reads {FORMAT}: write the manifest again"
        )
    top = _entry(values, _TOP, file, "")
    ids: dict[str, int] = {}
    adapters: dict[str, Path] = {}
    for index, value in enumerate(top["adapters"]):
        key = f"adapters.{index}"
        entry = _entry(value, _ADAPTER, file, key)
        name, number, folder = entry["lora_name"], entry["lora_int_id"], entry["lora_path"]
        if not name or any(letter in "=," or letter.isspace() for letter in name):
            raise UserError(
                f"{file}: {key}.lora_name={shown(name)}: not empty, and no space, '=' or ',' (--lora-modules)"
            )
        if name in ids:
            raise UserError(f"{file}: {key}.lora_name={name!r} is adapters.{ids[name] - 1} already: rename one of them")
        if number != index + 1:
            raise UserError(
                f"{file}: {key}.lora_int_id={shown(number)}: ids count from 1 in this order: set it to {index + 1}"
            )
        if not folder:
            raise UserError(f"{file}: {key}.lora_path is empty: name the adapter's folder")
        ids[name], adapters[name] = number, Path(folder)
    if not adapters:
        raise UserError(f"{file}: adapters is empty: name at least one")
    routes = tuple(_route(value, ids, file, f"requests.{index}") for index, value in enumerate(top["requests"]))
    return Manifest(routes, adapters)


def _route(value: object, ids: dict[str, int], file: str, key: str) -> Route:
    entry = _entry(value, _REQUEST, file, key)
    name, number, probability = entry["lora_name"], entry["lora_int_id"], entry["probability"]
    if name not in ids:
        raise UserError(f"{file}: {key}.lora_name={shown(name)} is none of the adapters {', '.join(ids)}")
    if number != ids[name]:
        raise UserError(f"{file}: {key}.lora_int_id={shown(number)}, but the id of {name!r} is {ids[name]}")
    if not 0 <= probability <= 1:  # also refuses NaN
        raise UserError(f"{file}: {key}.probability={shown(probability)}: expected 0 to 1")
    return Route(entry["request"], name, float(probability))


def _entry(value: object, kinds: dict[str, type], file: str, key: str) -> dict[str, Any]:
    """Check that `value` is an object with exactly these keys and kinds of values, and return it."""
    at, dot = f"{file}: {key}" if key else f"{file}: the manifest", f"{key}." if key else ""
    if not isinstance(value, dict):
        raise UserError(f"{at} is a {type(value).__name__}: expected an object with {', '.join(kinds)}")
    for name, kind in kinds.items():
        if name not in value:
            raise UserError(f"{at} has no {name}: add it ({_KINDS[kind]})")
        allowed = (int, float) if kind is float else kind
        if not isinstance(value[name], allowed) or isinstance(value[name], bool):
            raise UserError(f"{file}: {dot}{name}={shown(value[name])}: expected {_KINDS[kind]}")
    unknown = [name for name in value if name not in kinds]
    if unknown:
        raise UserError(
            f"{file}: {dot}{unknown[0][:120]} is no key of a manifest: remove it; known: {', '.join(kinds)}"
        )
    return value
