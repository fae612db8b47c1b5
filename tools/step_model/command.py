"""Estimate step time and memory of training a Qwen3-MoE text decoder, from counted FLOPs and bytes: no weights, no GPU.

    python -m tools.step_model.command --model qwen3-vl-30b-a3b --machine h100-8x --nodes 2 --ep-size 8 --checkpointing
    python -m tools.step_model.command --sweep --plot sweep.png --checkpointing --tokens 16384
    python -m tools.step_model.command --calibrate cpu.json                # measures this machine's CPU
    python -m tools.step_model.command --machine cpu.json --check step.json    # against `tools.bench.step.bench --json`

Everything printed is estimated, but for the columns named measured. Not counted: the vision tower, kernel launches and
Python, the reading of data. Of named machines peaks and links are from data sheets, the fractions of them that are
reached are assumptions; --machine FILE takes others.
"""

import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from ds_moe.errors import UserError
from ds_moe.memory.predict import GIB
from tools.results import command_line, new_table, refusing, show, write_json
from tools.step_model.check import check, check_table
from tools.step_model.costs import WIDTHS, Topology
from tools.step_model.machines import MACHINES, Machine, read_machine, write_machine
from tools.step_model.shapes import PRESETS, active_parameters, parameters, read_decoder
from tools.step_model.sweep import DEVICES, Point, best, point, sweep, write_figure


def parser() -> argparse.ArgumentParser:
    parser = command_line(__doc__, "--json")
    add, whole = parser.add_argument, {"type": int, "metavar": "N"}
    add("--model", default="qwen3-vl-30b-a3b", help=f"{', '.join(PRESETS)}, or a config.json (default %(default)s)")
    add("--machine", default="h100-8x", help=f"{', '.join(MACHINES)}, or a file of figures (default %(default)s)")
    add("--nodes", default=1, **whole)
    add("--devices-per-node", help="default: the machine's", **whole)
    add("--ep-size", default=1, **whole, help="ranks that share one copy of the experts (default 1)")
    add("--zero", dest="zero_stage", type=int, choices=(1, 2, 3), default=3, help="ZeRO stage (default 3)")
    add("--tokens", default=8192, **whole, help="of a rank and micro-step (default 8192)")
    add("--sequence", **whole, help="tokens of one sequence (default 4096, or all tokens if fewer)")
    add("--accumulation", default=1, **whole, help="micro-steps of an optimizer step (default 1)")
    add("--dtype", choices=WIDTHS, help="default bf16, or what the file of figures was measured in")
    add("--checkpointing", action="store_true", help="gradient checkpointing of every layer")
    add("--max-vio", type=float, default=0.0, metavar="X", help="rows of the busiest rank above its share (default 0)")
    modes = parser.add_argument_group("modes")
    modes.add_argument("--sweep", action="store_true", help="the best EP size of each number of devices")
    modes.add_argument("--devices", type=int, nargs="+", default=DEVICES, metavar="N", help="of --sweep")
    modes.add_argument("--plot", type=Path, metavar="PNG", help="with --sweep: tokens/s of a device over EP size")
    modes.add_argument("--check", type=Path, metavar="FILE", help="compare with results of tools.bench.step.bench")
    modes.add_argument("--calibrate", type=Path, metavar="FILE", help="measure this machine's CPU, write its figures")
    modes.add_argument("--processes", default=2, **whole, help="of --calibrate (default 2)")
    return parser


def setting(topology: Topology) -> str:
    parts = [
        f"ZeRO-{topology.zero_stage}",
        f"{topology.tokens:,} tokens a rank and micro-step in sequences of {topology.sequence:,}",
        f"accumulation {topology.accumulation}",
        topology.dtype,
        f"gradient checkpointing {'on' if topology.checkpointing else 'off'}",
    ]
    parts += [f"MaxVio {topology.max_vio:g}"] if topology.max_vio else []
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


def sweep_table(points: dict[int, list[Point]]) -> Table:
    columns = ("step ms", "tokens/s", "a device", "MFU", "MFU, full\noverlap", "GiB a\ndevice")
    table = new_table(["devices", "best EP"], columns, "estimated; the best EP size by tokens/s, no overlap")
    table.add_column("largest parts, no overlap")
    for count, row in points.items():
        winner = best(row)
        if winner is None:
            least = min(sum(p.memory.values()) for p in row) / GIB
            table.add_row(str(count), "none fits", *[""] * 5, f"{least:,.1f}", "memory")
            continue
        figures, speed = winner.estimate, winner.estimate.tokens_per_s
        cells = [f"{figures.step_s * 1e3:,.0f}", f"{speed:,.0f}", f"{speed / count:,.0f}", f"{figures.mfu:.1%}"]
        cells += [f"{figures.mfu_overlap:.1%}", f"{sum(winner.memory.values()) / GIB:,.1f}"]
        parts = list(figures.bounds(winner.topology.accumulation).items())[:3]
        bounds = ", ".join(f"{name} {seconds / figures.step_s:.0%}" for name, seconds in parts)
        table.add_row(str(count), str(winner.topology.ep_size), *cells, bounds)
    return table


def as_json(result: Point) -> dict[str, Any]:
    figures = {"topology": asdict(result.topology), "estimated": asdict(result.estimate)}
    return figures | {"estimated_memory_bytes": result.memory, "fits": result.fits}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Print what the mode asks for; the report that --json writes."""
    if options.plot and not options.sweep:
        raise UserError("--plot draws a sweep: add --sweep")
    if options.calibrate:
        from tools.step_model.calibrate import calibrate  # starts processes and imports torch: only here

        machine = calibrate(options.processes)
        write_machine(machine, options.calibrate)
        show("measured figures of this CPU:", asdict(machine))
        return {"machine": asdict(machine)}
    machine = read_machine(options.machine)
    options.dtype = options.dtype or next(iter(machine.peak_flops))
    if options.check:
        rows = check(options.check, machine)
        show(check_table(rows))
        return {"machine": asdict(machine), "check": rows}
    options.devices_per_node = options.devices_per_node or machine.devices_per_node
    options.sequence = options.sequence or min(options.tokens, 4096)
    topology = Topology(**{field.name: getattr(options, field.name) for field in fields(Topology)})
    decoder = read_decoder(options.model)
    total, active = (count(decoder) / 1e9 for count in (parameters, active_parameters))
    described = f"{decoder.name}: {total:.2f}B parameters, {active:.2f}B active; {machine.name} ({machine.source})"
    show(f"{described}\n{setting(topology)}", highlight=False)
    facts = {"model": asdict(decoder), "machine": asdict(machine)}
    if options.sweep:
        points = sweep(topology, decoder, machine, options.devices)
        show(sweep_table(points))
        if options.plot:
            load = f"ZeRO-{topology.zero_stage}, {topology.tokens:,} tokens a rank"
            title = f"{decoder.name} on {machine.name}, {load}, no overlap"
            write_figure(points, title, options.plot)
        return facts | {"sweep": {count: [as_json(p) for p in row] for count, row in points.items()}}
    result = point(topology, decoder, machine)
    show(term_table(result), memory_table(result, machine))
    show(summary(result), highlight=False)
    return facts | as_json(result)


@refusing
def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    write_json(run(options), options.json, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
