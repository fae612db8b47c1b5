"""What the commands of tools share: options, tables, claims about figures, and the files that hold them."""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypedDict

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ds_moe.errors import UserError

SHARED: dict[str, dict[str, Any]] = {  # options of several commands
    "--suite": {"choices": ["cpu"], "default": "cpu", "help": "where to run"},
    "--json": {"type": Path, "metavar": "FILE", "help": "also write every figure and the settings here"},
    "--plot": {"type": Path, "metavar": "FILE", "help": "draw the result as PNG"},
    "--show": {"type": Path, "metavar": "FILE", "help": "an earlier --json to print and draw; run nothing"},
}


class Claim(TypedDict):
    """A sentence with the figures that it is about, and whether they bear it out."""

    claim: str
    holds: bool


def command_line(description: str | None, *shared: str) -> argparse.ArgumentParser:
    """A parser with those of the `SHARED` options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in shared:
        parser.add_argument(option, **SHARED[option])
    return parser


def refusing(main: Callable[..., int]) -> Callable[..., int]:
    """A `main` that prints a UserError in one line and returns 2."""

    @functools.wraps(main)
    def guarded(*arguments: Any) -> int:
        try:
            return main(*arguments)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return guarded


def show(*parts: Any, width: int = 140, **how: Any) -> None:
    """Print with rich; without a terminal as wide as `width`, so that no column wraps in a log file."""
    Console(width=None if sys.stdout.isatty() else width).print(*parts, **how)


def new_table(words: Iterable[str], numbers: Iterable[str], title: str | None = None) -> Table:
    """Columns of words, then of numbers, which stand at the right and do not wrap."""
    table = Table(*words, title=title, title_justify="left")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def markdown(columns: str, rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; `columns` are separated by " | "."""
    lines = [columns, "|".join("---" for _ in columns.split(" | ")), *(" | ".join(row) for row in rows)]
    return "\n".join(f"|{line}|" if line.startswith("---") else f"| {line} |" for line in lines)


def spread(values: list[float]) -> float | None:
    """Standard deviation over seeds (n - 1); None for a single seed."""
    return statistics.stdev(values) if len(values) > 1 else None


def spread_text(values: list[float], digits: str, digits_of_spread: str | None = None) -> str:
    deviation, mean = spread(values), format(statistics.mean(values), digits)
    return mean if deviation is None else f"{mean} ± {deviation:{digits_of_spread or digits}}"


def judged(found: Iterable[tuple[str, Any]]) -> list[Claim]:
    """Of pairs of a sentence and what it comes to."""
    return [{"claim": text, "holds": bool(holds)} for text, holds in found]


def print_claims(claims: Iterable[Claim]) -> None:
    for claim in claims:
        print(f"{'holds' if claim['holds'] else 'DOES NOT HOLD'}: {claim['claim']}")


def save_with_legend(figure: Figure, file: Path) -> None:
    """As `save`, with the labels of the first panel below all of them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    save(figure, file)


def save(figure: Figure, file: Path) -> None:
    """As PNG, into a folder that is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def write_json(figures: Any, file: Path | None, indent: int | None = None) -> None:
    """Into a folder that is made if need be; nothing without a file."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=indent) + "\n")
