"""Mistakes in a YAML file whose keys are a tree of pydantic sections: one line each, "file:line: key, value, allowed".

The run file (`ds_moe.config`) and the spec of an assembly (`ds_moe.assembly`) are such files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ds_moe.config.sections import FORMS, origin_of
from ds_moe.config.yaml_lines import Plain, compose_lines, join, nearest, read_text
from ds_moe.errors import UserError, shown

LONGEST = 120  # characters of an example


def read_mapping(path: Path, schema: Schema) -> tuple[dict[str, Plain], dict[str, str]]:
    """Plain data of a YAML file, and "file:line" of every dotted key in it; `UserError` where that is no mapping."""
    data, origins = compose_lines(read_text(path, schema.noun), str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: a {schema.noun} is a mapping with the sections {', '.join(schema.sections[''])}")
    return data, origins


class Schema:
    """The keys of a tree of sections. All items of a list, and all kinds of a section, are one section."""

    def __init__(self, root: type[BaseModel], noun: str, habit: Callable[[str], str | None] = lambda _: None) -> None:
        self.noun = noun  # what messages call such a file
        self.habit = habit  # name of a key that this file does not have -> hint, where another tool's users write it
        self.sections: dict[str, list[str]] = {}  # dotted name of each section, "" of the root -> names of its keys
        self.kinds: dict[str, list[str]] = {}  # name of each section that has a key `kind` -> its values
        self.fields: dict[str, FieldInfo] = {}  # dotted name of each key -> its type and default, of its first kind
        self.forms: set[str] = set()  # sections in whose place a text may stand
        for key, section in _sections(root):
            names = self.sections.setdefault(key, [])
            names += [name for name in section.model_fields if name not in names]
            for name, field in section.model_fields.items():
                self.fields.setdefault(join(key, name), field)
                if _models_in(field.annotation) and _takes_text(field.annotation):
                    self.forms.add(join(key, name))
            if kind := section.model_fields.get("kind"):
                self.kinds.setdefault(key, []).extend(get_args(kind.annotation))
        self.keys = [join(section, name) for section, names in self.sections.items() for name in names]
        self._tags = {kind for kinds in self.kinds.values() for kind in kinds} | set(FORMS)

    def complaints(self, error: ValidationError, origins: dict[str, str], file: str) -> list[str]:
        """One line for each mistake that pydantic found, in the order of the file; keys not written are of `file`."""
        found = [self._complaint(detail, origins, file) for detail in error.errors(include_url=False)]
        return sorted(found, key=_line)

    def _complaint(self, detail: ErrorDetails, origins: dict[str, str], file: str) -> str:
        """One of pydantic's error details as "file:line: key ... what is allowed"."""
        key = self._key_of(detail["loc"])
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
            allowed = ", ".join(map(repr, self.kinds[_section(key)]))
            return f"{where}: {key}.kind is {shown(tag)}; must be one of {allowed}"
        if kind in ("model_type", "model_attributes_type"):
            keys = ", ".join(self._keys_in(key))
            return f"{where}: {key} is {shown(value)}; must be a section with keys {keys}"
        if kind == "value_error":
            return f"{where}: {key}: {context['error']}"
        reason = detail["msg"].replace("Input should be", "must be").replace("a valid string", "text (in quotes)")
        if kind in ("list_type", "tuple_type"):
            reason = f"must be a valid list: write it as {self._example(key, value)}"
        return f"{where}: {key} is {shown(value)}; {reason[0].lower() + reason[1:]}"

    def _example(self, key: str, value: Plain) -> str:
        """The list that one value of a key most likely stands for; where there is none like it, the key's default, or,
        since an empty list says nothing about sections, one section."""
        field = self.fields[_section(key)]
        kinds = self.kinds.get(_section(key), [])
        for items in _listed(value):
            items = [{"kind": item} if item in kinds else item for item in items]
            try:
                TypeAdapter(field.rebuild_annotation()).validate_python(items)
            except ValidationError:
                continue
            text = yaml.safe_dump(items, default_flow_style=True, width=10 * LONGEST, sort_keys=False).strip()
            if len(text) <= LONGEST:
                return text
        section = [{"kind": kind} for kind in kinds if kind != "none"][:1]
        default = list(field.get_default(call_default_factory=True) or section)
        return yaml.safe_dump(default, default_flow_style=True, width=10 * LONGEST).strip()

    def _unknown(self, key: str) -> str:
        if _section(key) in self.keys:  # a key of another kind of this section
            return f"{key} would not be used: the kind of {key.rpartition('.')[0]} has no such key; remove it"
        return f"unknown key {key} ({self._hint(key)})"

    def _keys_in(self, section: str) -> list[str]:
        """Keys of a section, which may be an item of a list ("moe.balance.0"); none where it is unknown."""
        return self.sections.get(_section(section), [])

    def _hint(self, key: str) -> str:
        """What was most likely meant by an unknown key.

        In this order: the only key that has this name in any section, what users of other tools mean by the name, the
        key of the root that has it, the most alike key of the same section, the most alike last name of any section,
        the most alike whole key.
        """
        parent, _, name = key.rpartition(".")
        elsewhere = [candidate for candidate in self.keys if candidate.endswith(f".{name}")]
        if len(elsewhere) == 1:
            return f"did you mean {elsewhere[0]}?"
        if (hint := self.habit(name)) is not None:
            return hint
        if name in self.sections[""]:
            return f"did you mean {name} at the top level?"
        siblings = self._keys_in(parent)
        by_name = {candidate.rpartition(".")[2]: candidate for candidate in reversed(self.keys)}
        if sibling := nearest(name, siblings):
            near = join(parent, sibling)
        elif same := nearest(name, list(by_name)):
            near = by_name[same]
        else:
            near = nearest(key, self.keys)
        return f"did you mean {near}?" if near else f"keys here: {', '.join(siblings or self.sections[''])}"

    def _key_of(self, location: tuple[int | str, ...]) -> str:
        """Dotted key of pydantic's error location, without the tags it inserts where a section is a union of kinds or
        forms, and without the mark that the key of a mapping, not its value, is wrong."""
        names: list[str] = []
        tagged = False
        for name in location if location[-1:] != ("[key]",) else location[:-1]:
            tagged = name in self._tags and not tagged  # no key is called like a kind, but a misspelt one may be
            if not tagged:
                names.append(str(name))
        return ".".join(names)


def descend(data: Plain, key: str) -> Plain:
    """The value of a dotted key in nested mappings; None: there is none."""
    for name in key.split(".") if key else []:
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _listed(value: Plain) -> Iterator[list[Plain]]:
    """Lists that a single value may stand for: the parts of "a, b", else the value alone."""
    if isinstance(value, str):
        try:
            parts, _ = compose_lines(f"[{value}]", "value")
            yield parts if isinstance(parts, list) else []
        except UserError:
            pass
    yield [value]


def _section(key: str) -> str:
    """A dotted key without the indices of lists, as `Schema` knows it."""
    return re.sub(r"\.\d+", "", key)


def _sections(model: type[BaseModel], key: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """(dotted name, class) of a section and all sections below it; a union of kinds gives one pair a kind."""
    yield key, model
    for name, field in model.model_fields.items():
        for child in _models_in(field.annotation):
            yield from _sections(child, join(key, name))


def _models_in(annotation: object) -> list[type[BaseModel]]:
    """The sections among the types of a field: `MoEConfig | None` has one, a list of a union of kinds several."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _takes_text(annotation: object) -> bool:
    """Whether a field may hold a text, by itself or in a list."""
    return annotation is str or any(_takes_text(argument) for argument in get_args(annotation))


def _line(complaint: str) -> int:
    line = re.match(r".*?:(\d+): ", complaint)
    return int(line[1]) if line else 0
