"""The routing manifest: a JSON file that tells an inference engine which adapter serves which request.

    {"format": 1,
     "adapters": [{"lora_name": "ocr", "lora_int_id": 1, "lora_path": "/runs/ocr"}],
     "requests": [{"request": "a.jsonl:7", "lora_name": "ocr", "lora_int_id": 1, "probability": 0.93}]}

vLLM's `LoRARequest(**entry)` takes an entry of `adapters`; ids count from 1, because 0 is the base model. Its server
takes `lora_name=lora_path` after `--lora-modules`, or its JSON form where a path contains "=" or ",".
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ds_moe.errors import UserError, shown

FORMAT = 1


@dataclass(frozen=True)
class Route:
    """The gate's first choice for one request."""

    where: str  # the request: file:line
    adapter: str
    probability: float  # that the gate gives to `adapter`


def write_manifest(path: Path, routes: Iterable[Route], adapters: dict[str, Path]) -> None:
    """Write the manifest completely or not at all. Relative folders of adapters become absolute.

    Raises:
        UserError: an adapter's name that vLLM's server would split; an existing file then stays unchanged.
    """
    ids = {name: number for number, name in enumerate(adapters, 1)}
    for name, number in ids.items():
        if any(letter in "=," or letter.isspace() for letter in name):
            key = f"adapters.{number - 1}.lora_name"
            raise UserError(f"{path}: {key}={shown(name)}: not empty, and no space, '=' or ',' (--lora-modules)")
    values = {
        "format": FORMAT,
        "adapters": [
            {"lora_name": name, "lora_int_id": ids[name], "lora_path": str(folder.absolute())}
            for name, folder in adapters.items()
        ],
        "requests": [
            {"request": one.where, "lora_name": one.adapter, "lora_int_id": ids[one.adapter]}
            | {"probability": one.probability}
            for one in routes
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
