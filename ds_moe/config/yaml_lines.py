"""What a complaint about a YAML or JSON file needs: the line of each key, and the known key nearest to a wrong one."""

import difflib
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TypeAlias

import yaml

from ds_moe.errors import UserError, shown

Plain: TypeAlias = "dict[str, Plain] | list[Plain] | str | int | float | bool | bytes | date | None"  # of YAML, JSON

MAX_BYTES = 2**16  # of a file: people write these files by hand, and the YAML parser is slow
MAX_VALUES = 10_000  # of a file; what an alias (*name) repeats counts again
MAX_KEY = 200  # characters
COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


def read_text(path: Path, noun: str) -> str:
    """The text of a small file, which messages call `noun`.

    Raises `UserError` where it is missing, no regular file (a pipe would wait for a writer), too large, or not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: cannot read the {noun} (give a file, no folder, pipe or device)")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UserError(
                f"{path}: the {noun} has {size} bytes, at most {MAX_BYTES} are read (is it the right file?)"
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the {noun} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the {noun} is not UTF-8 text ({error.reason} at byte {error.start})") from error


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads numbers as YAML 1.2 does: to YAML 1.1, 1e-4 is a text, 010 is 8 and 1:30 is 90."""


_INT = re.compile(r"^[-+]?(0|[1-9][\d_]*)$")
_FLOAT = re.compile(r"^[-+]?((\d[\d_]*)?\.?\d+([eE][-+]?\d+)?|\d[\d_]*\.([eE][-+]?\d+)?|\.inf|\.nan)$", re.IGNORECASE)
_Loader.yaml_implicit_resolvers = {
    first: [one for one in resolvers if one[0] not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def compose_lines(text: str, file: str) -> tuple[Plain, dict[str, str]]:
    """Plain data of a YAML (or JSON) text, and "file:line" of every dotted key in it.

    Raises `UserError` for broken YAML, a key written twice, a tag for more than plain data, or too many values.
    """
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # a control character
        raise UserError(f"{file}: not valid YAML ({str(error).splitlines()[0]})") from error
    origins: dict[str, str] = {}
    values = 0

    def build(node: yaml.Node, key: str) -> Plain:
        nonlocal values
        values += 1
        where = f"{file}:{node.start_mark.line + 1}"
        if values > MAX_VALUES:
            raise UserError(f"{where}: more than {MAX_VALUES} values, aliases (*name) followed (write them out)")
        if node.tag not in (loader.yaml_constructors if isinstance(node, yaml.ScalarNode) else COLLECTIONS):
            raise UserError(f"{where}: the tag {shown(node.tag)} is not read: values are plain data (remove it)")
        if isinstance(node, yaml.MappingNode):
            return build_mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            items = [(join(key, str(index)), child) for index, child in enumerate(node.value)]
            origins.update({item: f"{file}:{child.start_mark.line + 1}" for item, child in items})
            return [build(child, item) for item, child in items]
        return loader.construct_object(node)

    def build_mapping(node: yaml.MappingNode, key: str) -> dict[str, Plain]:
        mapping: dict[str, Plain] = {}
        for name_node, value_node in node.value:
            name, where = name_node.value, f"{file}:{name_node.start_mark.line + 1}"
            if not isinstance(name, str) or len(name) > MAX_KEY or not name.isprintable():
                raise UserError(f"{where}: a key is {shown(name)}; must be short text without invisible characters")
            if name in mapping:
                raise UserError(
                    f"{where}: duplicate key {join(key, name)} (first at {origins[join(key, name)]}); keep one of them"
                )
            origins[join(key, name)] = where
            mapping[name] = build(value_node, join(key, name))
        return mapping

    try:
        node = loader.get_single_node()
        return (None if node is None else build(node, "")), origins
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{file}{line}: not valid YAML ({error.problem or error.context})") from error
    except ValueError as error:  # impossible dates, numbers of thousands of digits
        raise UserError(f"{file}: not valid YAML ({str(error).partition(';')[0]})") from error
    except RecursionError as error:
        raise UserError(f"{file}: nested too deeply, or an alias (*name) within itself (write it out)") from error
    finally:
        loader.dispose()


def join(parent: str, name: str) -> str:
    """Dotted key of `name` below `parent`; "" is the root."""
    return f"{parent}.{name}" if parent else name


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that somebody who typed `name` most likely meant; None: there is none like it."""
    longer = [candidate for candidate in known if candidate.startswith(f"{name}_")]
    if len(longer) == 1:
        return longer[0]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return close[0] if close else None
