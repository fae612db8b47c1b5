"""Estimated against measured steps: results of the step's benchmark, whose contenders all train under ZeRO-3."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ds_moe.errors import UserError
from tools.step_model.costs import Topology
from tools.step_model.machines import Machine
from tools.step_model.memory import memory
from tools.step_model.shapes import Decoder, from_config
from tools.step_model.step_time import estimate, exchanged_bytes

GATHERED = "zero3"  # the contender that gathers all experts; the others spread them over all processes
MIB = 2**20
WRITTEN = "give what tools.bench.step.bench --json wrote"


@dataclass(frozen=True)
class Measured:
    """One result of the benchmark; `sent_bytes` of the busiest rank in all-to-alls, where they were measured."""

    contender: str
    decoder: Decoder
    topology: Topology
    median_s: float
    sent_bytes: float | None
    peak_bytes: float | None


@dataclass(frozen=True)
class Compared:
    contender: str
    processes: int
    tokens: int
    ep_size: int
    measured_s: float
    estimated_s: float  # no overlap
    estimated_overlap_s: float
    measured_sent_bytes: float | None
    estimated_sent_bytes: float
    measured_peak_bytes: float | None
    estimated_peak_bytes: float

    @property
    def error(self) -> float:
        """Of the time without overlap, relative to the measured one."""
        return self.estimated_s / self.measured_s - 1


def value(row: dict[str, Any], key: str, file: Path) -> Any:
    """
    Raises:
        UserError: no such key, or no value.
    """
    if row.get(key) is None:
        raise UserError(f"--check {file}: no {key} in {json.dumps(row)[:100]}; {WRITTEN}")
    return row[key]


def read_results(file: Path) -> list[Measured]:
    """Every result that was timed.

    Raises:
        UserError: no such file, or not what the benchmark writes; names the missing key.
    """
    try:
        report = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--check {file}: {error}") from error
    if not isinstance(report, dict) or not isinstance(report.get("results"), list):
        raise UserError(f"--check {file}: no results; {WRITTEN}")
    decoder = from_config(value(report, "model", file), f"--check {file}, model")
    sequence, dtype = value(report, "sequence", file), value(value(report, "environment", file), "dtype", file)
    measured = []
    for row in report["results"]:
        contender, processes, tokens = (value(row, key, file) for key in ("contender", "processes", "tokens"))
        if row.get("median_s") is None:
            continue  # computed something else
        ep_size = 1 if contender == GATHERED else processes
        topology = Topology(1, processes, ep_size, 3, tokens, sequence, dtype=dtype)
        others = (row.get(key) for key in ("sent_bytes", "peak_bytes"))
        measured.append(Measured(contender, decoder, topology, row["median_s"], *others))
    return measured


def check(results: Iterable[Measured], machine: Machine) -> list[Compared]:
    """
    Raises:
        UserError: more processes than the machine has devices; EP sizes that cannot be.
    """
    compared = []
    for result in results:
        topology = result.topology
        if topology.world > machine.devices_per_node:
            raise UserError(
                f"--check: {topology.world} processes, but the figures of {machine.name} are those of "
                f"{machine.devices_per_node}; use --calibrate with --processes {topology.world}"
            )
        figures = estimate(topology, result.decoder, machine)
        compared.append(
            Compared(
                *(result.contender, topology.world, topology.tokens, topology.ep_size),
                *(result.median_s, figures.step_s, figures.step_overlap_s),
                *(result.sent_bytes, exchanged_bytes(topology, result.decoder)),
                *(result.peak_bytes, sum(memory(topology, result.decoder, machine).values())),
            )
        )
    return compared


def check_table(rows: list[Compared]) -> Table:
    table = Table("contender", title="measured by tools.bench.step.bench (m), and estimated (e)")
    for column in ("processes", "EP", "tokens\na rank", "step ms\nm", "no overlap\ne", "error", "full overlap\ne"):
        table.add_column(column, justify="right")
    for column in ("MiB sent\nm", "\ne", "peak MiB\nm", "\ne"):
        table.add_column(column, justify="right")
    for row in rows:
        times = [f"{seconds * 1e3:,.0f}" for seconds in (row.measured_s, row.estimated_s, row.estimated_overlap_s)]
        sizes = [row.measured_sent_bytes, row.estimated_sent_bytes, row.measured_peak_bytes, row.estimated_peak_bytes]
        cells = [str(row.processes), str(row.ep_size), f"{row.tokens:,}", *times[:2], f"{row.error:+.0%}", times[2]]
        table.add_row(row.contender, *cells, *("" if size is None else f"{size / MIB:,.1f}" for size in sizes))
    return table
