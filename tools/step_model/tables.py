"""Tables of estimates for a terminal; every figure in them is estimated."""

from __future__ import annotations

from rich.table import Table

from ds_moe.memory.predict import GIB
from tools.results import new_table
from tools.step_model.costs import Topology
from tools.step_model.machines import Machine
from tools.step_model.sweep import Point, best


def setting(topology: Topology) -> str:
    """What all topologies of a run share, in one line."""
    parts = [
        f"ZeRO-{topology.zero_stage}",
        f"{topology.tokens:,} tokens a rank and micro-step in sequences of {topology.sequence:,}",
        f"accumulation {topology.accumulation}",
        topology.dtype,
        f"gradient checkpointing {'on' if topology.checkpointing else 'off'}",
    ]
    parts += [f"MaxVio {topology.max_vio:g}"] if topology.max_vio else []
    parts += [f"{topology.chunks} chunks"] if topology.chunks > 1 else []
    return ", ".join(parts)


def term_table(result: Point) -> Table:
    accumulation = result.topology.accumulation
    step_s = result.estimate.step_s
    columns = ("forward", "repeated", "backward", "once", "total", "share")
    table = new_table(["estimated term", "bound by"], columns, "time of one optimizer step, no overlap, ms")
    for term in result.estimate.terms:
        parts = [accumulation * part for part in (term.forward_s, term.again_s, term.backward_s)]
        parts += [term.last_s + term.step_s, term.total_s(accumulation)]
        cells = [f"{part * 1e3:,.2f}" if part else "" for part in parts]
        table.add_row(term.name, term.bound, *cells, f"{term.total_s(accumulation) / step_s:.1%}")
    table.add_section()
    for bound, seconds in result.estimate.bounds(accumulation).items():
        table.add_row(f"sum of {bound}", bound, "", "", "", "", f"{seconds * 1e3:,.2f}", f"{seconds / step_s:.1%}")
    return table


def memory_table(result: Point, machine: Machine) -> Table:
    table = new_table(["estimated purpose"], ["GiB"], "peak memory of one rank")
    for name, size in result.memory.items():
        table.add_row(name, f"{size / GIB:,.2f}")
    table.add_section()
    verdict = "fits" if result.fits else "DOES NOT FIT"
    total = sum(result.memory.values()) / GIB
    table.add_row(f"total ({verdict} {machine.memory / GIB:,.1f} GiB)", f"{total:,.2f}")
    return table


def summary(result: Point) -> str:
    figures, world = result.estimate, result.topology.world
    lines = [f"{world} devices, EP {result.topology.ep_size}, ZeRO-{result.topology.zero_stage}; estimated:"]
    for name, step_s, speed, mfu in (
        ("no overlap", figures.step_s, figures.tokens_per_s, figures.mfu),
        ("full overlap", figures.step_overlap_s, figures.tokens_overlap_per_s, figures.mfu_overlap),
    ):
        rates = f"{speed:,.0f} tokens/s ({speed / world:,.0f} a device)"
        lines.append(f"  {name:<13} {step_s * 1e3:>10,.1f} ms a step   {rates}   MFU {mfu:.1%}")
    return "\n".join(lines)


def sweep_table(points: dict[int, list[Point]], overlap: bool) -> Table:
    how = "full overlap" if overlap else "no overlap"
    columns = ("step ms", "tokens/s", "a device", "MFU", "MFU, full\noverlap", "GiB a\ndevice")
    table = new_table(["devices", "best EP"], columns, f"estimated; the best EP size by tokens/s, {how}")
    table.add_column("largest parts, no overlap")
    for count, row in points.items():
        winner = best(row, overlap)
        if winner is None:
            least = min(sum(p.memory.values()) for p in row) / GIB
            table.add_row(str(count), "none fits", *[""] * 5, f"{least:,.1f}", "memory")
            continue
        figures, speed = winner.estimate, winner.tokens_per_s(overlap)
        step_s = figures.step_overlap_s if overlap else figures.step_s
        cells = [f"{step_s * 1e3:,.0f}", f"{speed:,.0f}", f"{speed / count:,.0f}", f"{figures.mfu:.1%}"]
        cells += [f"{figures.mfu_overlap:.1%}", f"{sum(winner.memory.values()) / GIB:,.1f}"]
        parts = list(figures.bounds(winner.topology.accumulation).items())[:3]
        bounds = ", ".join(f"{name} {seconds / figures.step_s:.0%}" for name, seconds in parts)
        table.add_row(str(count), str(winner.topology.ep_size), *cells, bounds)
    return table
