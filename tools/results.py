"""What a benchmark or a demo is to show, and the file that holds its figures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict


class Claim(TypedDict):
    """A sentence with the figures that it is about, and whether they bear it out."""

    claim: str
    holds: bool


def judged(found: Iterable[tuple[str, Any]]) -> list[Claim]:
    """Of pairs of a sentence and what it comes to."""
    return [{"claim": text, "holds": bool(holds)} for text, holds in found]


def print_claims(claims: Iterable[Claim]) -> None:
    for claim in claims:
        print(f"{'holds' if claim['holds'] else 'DOES NOT HOLD'}: {claim['claim']}")


def write_json(figures: Any, file: Path | None, indent: int | None = None) -> None:
    """Into a folder that is made if need be; nothing without a file."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=indent) + "\n")
