"""Estimated against measured steps: results of the step's benchmark, whose contenders all train under ZeRO-3."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from ds_moe.errors import UserError
from tools.results import new_table
from tools.step_model.costs import Topology
from tools.step_model.machines import Machine
from tools.step_model.shapes import Decoder, from_config
from tools.step_model.step_time import estimate, exchanged_bytes
from tools.step_model.sweep import memory

GATHERED = "zero3"  # the contender that gathers all experts; the others spread them over all processes
MIB = 2**20
WRITTEN = "give what tools.bench.step.bench --json wrote"

Row = dict[str, Any]


def check(file: Path, machine: Machine) -> list[Row]:
    """Every result that was timed, beside its estimate; `estimated_s` is without overlap."""
    try:
        report = json.loads(file.read_text())
        decoder = from_config(report["model"], f"--check {file}, model")
        return compared(report, decoder, machine)
    except KeyError as error:
        raise UserError(f"--check {file}: no {error.args[0]}; {WRITTEN}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--check {file}: {error}; {WRITTEN}") from error


def compared(report: Row, decoder: Decoder, machine: Machine) -> list[Row]:
    sequence, dtype, rows = report["sequence"], report["environment"]["dtype"], []
    for result in report["results"]:
        contender, processes, tokens = (result[key] for key in ("contender", "processes", "tokens"))
        if result.get("median_s") is None:
            continue  # computed something else
        if processes > machine.devices_per_node:
            raise UserError(
                f"--check: {processes} processes, but the figures of {machine.name} are those of "
                f"{machine.devices_per_node}; use --calibrate with --processes {processes}"
            )
        ep_size = 1 if contender == GATHERED else processes
        topology = Topology(1, processes, ep_size, 3, tokens, sequence, dtype=dtype)
        figures = estimate(topology, decoder, machine)
        row = {"contender": contender, "processes": processes, "tokens": tokens, "ep_size": ep_size}
        row |= {"measured_s": result["median_s"], "estimated_s": figures.step_s}
        row |= {"estimated_overlap_s": figures.step_overlap_s}
        row |= {f"measured_{key}": result.get(key) for key in ("sent_bytes", "peak_bytes")}
        row["estimated_sent_bytes"] = exchanged_bytes(topology, decoder)
        row["estimated_peak_bytes"] = sum(memory(topology, decoder, machine).values())
        rows.append(row)
    return rows


def check_table(rows: list[Row]) -> Table:
    columns = ["processes", "EP", "tokens\na rank", "step ms\nm", "no overlap\ne", "error", "full overlap\ne"]
    columns += ["MiB sent\nm", "\ne", "peak MiB\nm", "\ne"]
    table = new_table(["contender"], columns, "measured by tools.bench.step.bench (m), and estimated (e)")
    for row in rows:
        times = [f"{row[key] * 1e3:,.0f}" for key in ("measured_s", "estimated_s", "estimated_overlap_s")]
        sizes = [row[f"{how}_{what}_bytes"] for what in ("sent", "peak") for how in ("measured", "estimated")]
        cells = [str(row["processes"]), str(row["ep_size"]), f"{row['tokens']:,}", *times[:2]]
        cells += [f"{row['estimated_s'] / row['measured_s'] - 1:+.0%}", times[2]]
        table.add_row(row["contender"], *cells, *("" if size is None else f"{size / MIB:,.1f}" for size in sizes))
    return table
