"""What a complaint about a YAML or JSON file needs: the line of each key, and the known key nearest to a wrong one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import yaml

from ds_moe.errors import UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as YAML 1.2 does; YAML 1.1 wants 1.0e-4 and takes the rest for text."""


_FLOAT = re.compile(r"^[-+]?((\d[\d_]*)?\.?\d+([eE][-+]?\d+)?|\d[\d_]*\.([eE][-+]?\d+)?|\.inf|\.nan)$", re.IGNORECASE)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def compose_lines(text: str, file: str) -> tuple[Any, dict[str, str]]:
    """Plain data of a YAML (or JSON) text, and "file:line" of every dotted key in it. Duplicate keys are errors."""
    loader = _Loader(text)
    origins: dict[str, str] = {}

    def build(node: yaml.Node, key: str) -> Any:
        if isinstance(node, yaml.MappingNode):
            return build_mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            items = [(join(key, str(index)), child) for index, child in enumerate(node.value)]
            origins.update({item: f"{file}:{child.start_mark.line + 1}" for item, child in items})
            return [build(child, item) for item, child in items]
        return loader.construct_object(node)

    def build_mapping(node: yaml.MappingNode, key: str) -> dict[str, Any]:
        mapping = {}
        for name_node, value_node in node.value:
            name, where = str(name_node.value), f"{file}:{name_node.start_mark.line + 1}"
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
    except (yaml.YAMLError, ValueError) as error:  # control characters, impossible dates
        raise UserError(f"{file}: not valid YAML ({str(error).splitlines()[0]})") from error
    finally:
        loader.dispose()


def join(parent: str, name: str) -> str:
    """Dotted key of `name` below `parent`; "" is the root."""
    return f"{parent}.{name}" if parent else name


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that `name` is most likely a typing error of, or short for."""
    longer = [candidate for candidate in known if candidate.startswith(f"{name}_")]
    if len(longer) == 1:
        return longer[0]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return close[0] if close else None
