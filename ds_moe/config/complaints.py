"""A typed YAML file: what is wrong with it as one line a mistake, "file:line: key, value, what is allowed".

Made for a tree of pydantic sections, of which the run file's (`ds_moe.config`) is one.
"""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ds_moe.config.sections import origin_of
from ds_moe.config.yaml_lines import compose_lines, join, nearest, read_text
from ds_moe.errors import UserError, shown


def read_mapping(path: Path, schema: Schema) -> tuple[dict[str, Any], dict[str, str]]:
    """Plain data of a YAML file, and "file:line" of every dotted key in it.

    Raises:
        UserError: a file that cannot be read, or that is no mapping.
    """
    data, origins = compose_lines(read_text(path, schema.noun), str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: a {schema.noun} is a mapping with the sections {', '.join(schema.sections[''])}")
    return data, origins


class Schema:
    """The keys of a tree of sections.

    Attributes:
        noun: what a file of this form is called in messages.
        sections: dotted name of each section -> names of its keys; "" is the root, items of a list are one section.
        keys: every dotted key.
        kinds: names of all kinds of sections.
    """

    def __init__(self, root: type[BaseModel], noun: str) -> None:
        self.noun = noun
        self.sections = _sections(root)
        self.keys = [join(section, name) for section, names in self.sections.items() for name in names]
        self.kinds = _kinds(root)

    def complaints(self, error: ValidationError, data: Any, origins: dict[str, str], file: str) -> list[str]:
        """All that pydantic found, in the order of the file.

        Args:
            data: what was validated.
            origins: where each dotted key was written.
            file: where keys stand that were not written.
        """
        found = [self._complaint(detail, data, origins, file) for detail in error.errors(include_url=False)]
        return sorted(found, key=_line)

    def _complaint(self, detail: Any, data: dict[str, Any], origins: dict[str, str], file: str) -> str:
        """One of pydantic's error details as "file:line: key ... what is allowed"."""
        key = self._key_of(detail["loc"], data)
        kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
        where = origin_of(key, origins, file)
        if kind == "extra_forbidden":
            if where.startswith("override "):  # name the key as it was typed, not only the part that went wrong
                typed = where.removeprefix("override ").partition("=")[0].strip()
                key = typed if typed.startswith(key) else key
            return f"{where}: {self._unknown(key)}"
        if kind == "missing":
            parent = key.rpartition(".")[0]
            return f"{where}: required key {key} is missing" + (f" from section {parent}" if parent else "")
        if kind.startswith("union_tag"):
            tag = value.get("kind") if isinstance(value, dict) else None
            allowed = context.get("expected_tags", "'none', 'aux', 'z_loss', 'loss_free'")
            return f"{where}: {key}.kind is {shown(tag)}; must be one of {allowed}"
        if kind in ("model_type", "model_attributes_type"):
            keys = ", ".join(self._keys_in(key))
            return f"{where}: {key} is {shown(value)}; must be a section with keys {keys}"
        if kind == "value_error":
            return f"{where}: {key}: {context['error']}"
        reason = detail["msg"].replace("Input should be", "must be").replace("a valid string", "text (in quotes)")
        return f"{where}: {key} is {shown(value)}; {reason[0].lower() + reason[1:]}"

    def _unknown(self, key: str) -> str:
        if re.sub(r"\.\d+", "", key) in self.keys:  # another kind of this section has it
            return f"{key} would not be used: the kind of {key.rpartition('.')[0]} has no such key; remove it"
        near = self._nearest(key)
        allowed = self._keys_in(key.rpartition(".")[0]) or self.sections[""]
        hint = f"did you mean {near}?" if near else f"keys here: {', '.join(allowed)}"
        return f"unknown key {key} ({hint})"

    def _keys_in(self, section: str) -> list[str]:
        """Keys of a section, given with or without list indices ("moe.balance.0"); none where it is unknown."""
        return self.sections.get(re.sub(r"\.\d+", "", section), [])

    def _nearest(self, key: str) -> str | None:
        """Nearest valid dotted key: that of another section if only its section is wrong, then the most alike among the
        keys of the same section, by last name, by whole key."""
        parent, _, name = key.rpartition(".")
        elsewhere = [candidate for candidate in self.keys if candidate.endswith(f".{name}")]
        if len(elsewhere) == 1:
            return elsewhere[0]
        if sibling := nearest(name, self._keys_in(parent)):
            return join(parent, sibling)
        by_name = {candidate.rpartition(".")[2]: candidate for candidate in reversed(self.keys)}
        same = nearest(name, list(by_name))
        return by_name[same] if same else nearest(key, self.keys)

    def _key_of(self, location: tuple[int | str, ...], tree: Any) -> str:
        """Dotted key of pydantic's error location, less the tags it inserts where a section is a union of kinds."""
        names: list[str] = []
        data: Any = tree
        tagged = False
        for name in location:
            tagged = name in self.kinds and not tagged  # no key is called like a kind, but a wrong one may be
            if tagged:
                continue
            names.append(str(name))
            if isinstance(data, dict):
                data = data.get(str(name))
            elif isinstance(data, list) and isinstance(name, int) and name < len(data):
                data = data[name]
        return ".".join(names)


def descend(data: Any, key: str) -> Any:
    """The value of a dotted key in nested mappings, None where there is none."""
    for name in key.split(".") if key else []:
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _sections(model: type[BaseModel], parent: str = "") -> dict[str, list[str]]:
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
    children = [child for field in model.model_fields.values() for child in _models_in(field.annotation)]
    own = typing.get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()
    return set(own).union(*map(_kinds, children))


def _line(complaint: str) -> int:
    line = re.match(r".*?:(\d+): ", complaint)
    return int(line[1]) if line else 0
