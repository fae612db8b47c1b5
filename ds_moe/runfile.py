"""A run file: YAML plus dotted overrides -> `RunConfig`, and every mistake in it as one line that says where and what.

`load_run` is what a run starts from; `parse_run` gives all the complaints at once, for the doctor.
"""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ds_moe.checks import problems, used_keys
from ds_moe.config import RunConfig, origin_of
from ds_moe.errors import UserError
from ds_moe.lines import compose_lines, join, nearest


def load_run(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run file, apply `key=value` overrides, check types and refuse keys that the run would not use.

    `deepspeed` is then the path of an existing JSON. Raises `UserError` with the first complaint.
    """
    config, complaints = parse_run(path, overrides)
    if config is None or complaints:
        raise UserError(complaints[0])
    return config


def parse_run(path: str | Path, overrides: list[str] | None = None) -> tuple[RunConfig | None, list[str]]:
    """(config, complaints): the config is None where the file could not be made into one."""
    file = str(path)
    try:
        data, origins = _read(Path(path))
        for override in overrides or []:
            _override(data, origins, override)
    except UserError as error:
        return None, [str(error)]
    for key in SECTIONS:  # `train:` with nothing below it is an empty section
        parent, _, name = key.rpartition(".")
        holder = _descend(data, parent)
        if isinstance(holder, dict) and name in holder and holder[name] is None and key in origins:
            holder[name] = None if origins[key].startswith("override ") else {}
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        found = [_complaint(detail, data, origins, file) for detail in error.errors(include_url=False)]
        return None, sorted(found, key=_line)
    config.remember_origins(file, origins)
    complaints = problems(config)
    try:
        config.deepspeed = str(_find_json(config, Path(path)))
    except UserError as error:
        complaints.append(str(error))
    return config, complaints


def dump(config: RunConfig) -> dict[str, Any]:
    """The resolved tree as plain data: every key this run uses, defaults filled in. `load_run` reads it back."""
    return used_keys(config)


def dump_yaml(config: RunConfig) -> str:
    """`dump` as the text of a run file."""
    return yaml.safe_dump(dump(config), sort_keys=False)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the run file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the run file is not UTF-8 text ({error.reason} at byte {error.start})") from error
    data, origins = compose_lines(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: a run file is a mapping with the sections {', '.join(RunConfig.model_fields)}")
    return data, origins


def _override(data: dict[str, Any], origins: dict[str, str], override: str) -> None:
    """Set one `dotted.key=value` in `data`; its origin and that of all below it becomes the override."""
    key, equals, text = override.partition("=")
    names: list[Any] = key.strip().split(".")
    if not equals or not all(names):
        raise UserError(f"override {override}: write it as dotted.key=value, e.g. train.lr=1e-4")
    try:
        value, _ = compose_lines(text, "value")
    except UserError as error:
        raise UserError(f"override {override}: {error}") from error
    holder: Any = data
    for depth, name in enumerate(names):
        last, so_far = depth == len(names) - 1, ".".join(names[:depth])
        if isinstance(holder, list):
            if not name.isdigit() or int(name) >= len(holder):
                raise UserError(f"override {override}: {so_far} is a list of {len(holder)}; {name} is no index in it")
            name = int(name)
        elif not isinstance(holder, dict):
            raise UserError(f"override {override}: {so_far} is {holder!r}, not a section")
        elif not last and holder.get(name) is None:
            holder[name] = {}
            origins[".".join(names[: depth + 1])] = f"override {override}"
        if last:
            holder[name] = value
        holder = holder[name]
    dotted = ".".join(names)
    for below in [origin for origin in origins if origin.startswith(dotted + ".")]:
        del origins[below]
    origins[dotted] = f"override {override}"


def _find_json(config: RunConfig, run_file: Path) -> Path:
    """The DeepSpeed JSON: beside the run file, else from the working directory."""
    for folder in (run_file.parent, Path()):
        found = Path(*(folder / config.deepspeed).parts)
        if found.is_file():
            return _shortest(found)
    raise UserError(
        f"{config.at('deepspeed')}: deepspeed is {config.deepspeed!r}, which is neither a file beside the run file "
        f"nor below the working directory {Path.cwd()}"
    )


def _shortest(path: Path) -> Path:
    """`path` without "..", relative to the working directory where it lies below it."""
    resolved = path.resolve()
    return resolved.relative_to(Path.cwd()) if resolved.is_relative_to(Path.cwd()) else resolved


def _sections(model: type[BaseModel], parent: str = "") -> dict[str, list[str]]:
    """Dotted name of each section -> names of its keys; "" is the root, items of a list count as one section."""
    found = {parent: list(model.model_fields)}
    for name, field in model.model_fields.items():
        for child in _models_in(field.annotation):
            for key, names in _sections(child, join(parent, name)).items():
                found[key] = list(dict.fromkeys(found.get(key, []) + names))
    return found


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]


def _kinds(model: type[BaseModel]) -> set[str]:
    """Names of all kinds of sections."""
    children = [child for field in model.model_fields.values() for child in _models_in(field.annotation)]
    own = typing.get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()
    return set(own).union(*map(_kinds, children))


KINDS = _kinds(RunConfig)
SECTIONS = _sections(RunConfig)
ALL_KEYS = [join(section, name) for section, names in SECTIONS.items() for name in names]


def _keys_of(section: str) -> list[str]:
    """Valid keys of a section, given with or without list indices ("moe.balance.0"); none where it is unknown."""
    return SECTIONS.get(re.sub(r"\.\d+", "", section), [])


def _nearest_key(key: str) -> str | None:
    """Nearest valid dotted key: that of another section if only its section is wrong, then the most alike among the
    keys of the same section, by last name, by whole key."""
    parent, _, name = key.rpartition(".")
    elsewhere = [candidate for candidate in ALL_KEYS if candidate.endswith(f".{name}")]
    if len(elsewhere) == 1:
        return elsewhere[0]
    if sibling := nearest(name, _keys_of(parent)):
        return join(parent, sibling)
    by_name = {candidate.rpartition(".")[2]: candidate for candidate in reversed(ALL_KEYS)}
    same = nearest(name, list(by_name))
    return by_name[same] if same else nearest(key, ALL_KEYS)


def _descend(data: Any, key: str) -> Any:
    for name in key.split(".") if key else []:
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _complaint(detail: Any, data: dict[str, Any], origins: dict[str, str], file: str) -> str:
    """One of pydantic's error details as "file:line: key ... what is allowed"."""
    key = _key_of(detail["loc"], data)
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    where = origin_of(key, origins, file)
    if kind == "extra_forbidden":
        if where.startswith("override "):  # name the key as it was typed, not only the part that went wrong
            typed = where.removeprefix("override ").partition("=")[0].strip()
            key = typed if typed.startswith(key) else key
        if re.sub(r"\.\d+", "", key) in ALL_KEYS:  # another kind of this section has it
            return f"{where}: {key} would not be used: the kind of {key.rpartition('.')[0]} has no such key; remove it"
        near = _nearest_key(key)
        allowed = _keys_of(key.rpartition(".")[0]) or SECTIONS[""]
        hint = f"did you mean {near}?" if near else f"keys here: {', '.join(allowed)}"
        return f"{where}: unknown key {key} ({hint})"
    if kind == "missing":
        parent = key.rpartition(".")[0]
        return f"{where}: required key {key} is missing" + (f" from section {parent}" if parent else "")
    if kind.startswith("union_tag"):
        tag = value.get("kind") if isinstance(value, dict) else None
        allowed = context.get("expected_tags", "'none', 'aux', 'z_loss', 'loss_free'")
        return f"{where}: {key}.kind is {tag!r}; must be one of {allowed}"
    if kind in ("model_type", "model_attributes_type"):
        keys = ", ".join(_keys_of(key))
        return f"{where}: {key} is {value!r}; must be a section with keys {keys}"
    if kind == "value_error":
        return f"{where}: {key}: {context['error']}"
    reason = detail["msg"].replace("Input should be", "must be").replace("a valid string", "text (in quotes)")
    return f"{where}: {key} is {value!r}; {reason[0].lower() + reason[1:]}"


def _line(complaint: str) -> int:
    line = re.match(r".*?:(\d+): ", complaint)
    return int(line[1]) if line else 0


def _key_of(location: tuple[int | str, ...], tree: Any) -> str:
    """Dotted key of pydantic's error location, less the tags it inserts where a section is a union of kinds."""
    names: list[str] = []
    data: Any = tree
    tagged = False
    for name in location:
        tagged = name in KINDS and not tagged  # no key is called like a kind, but a wrong one may be
        if tagged:
            continue
        names.append(str(name))
        if isinstance(data, dict):
            data = data.get(str(name))
        elif isinstance(data, list) and isinstance(name, int) and name < len(data):
            data = data[name]
    return ".".join(names)
