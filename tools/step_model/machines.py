"""Machines that steps are estimated for: named ones from data sheets, others from a file of figures."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ds_moe.errors import UserError
from tools.results import write_json

GB = 1e9
COLLECTIVES = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")
ADAM_FUSED_BYTES = 28  # an element: reads gradient, master weight and both moments in fp32, writes the last three


@dataclass(frozen=True)
class Link:
    """What one device sends and receives: bytes/s in each direction, seconds for a hop."""

    bandwidth: float
    latency_s: float


@dataclass(frozen=True)
class Machine:
    name: str
    peak_flops: dict[str, float]  # FLOP/s of matrix products by dtype; MFU refers to them
    dense: float  # fraction of the peak that dense GEMMs reach; so the next two
    grouped: float
    attention: float  # scores
    memory_bandwidth: float  # bytes/s that elementwise work reaches
    memory: float  # bytes
    intra: Link  # within a node, as the device sees it
    inter: Link  # between nodes
    devices_per_node: int
    runtime: float = 1.5 * 2**30  # bytes that context, libraries and communication buffers take
    adam_bytes: float = ADAM_FUSED_BYTES  # memory traffic of the optimizer, an element
    collectives: dict[str, Link] = field(default_factory=dict)  # measured within a node, in place of `intra`
    source: str = ""  # where the figures are from

    def link(self, collective: str) -> Link:
        return self.collectives.get(collective, self.intra)


# Peaks: NVIDIA's data sheets of the SXM5 and SXM4 80 GB cards, without sparsity; fp32 without TF32. The fractions (of
# peak, 0.85 of memory bandwidth, 0.8 of links) and latencies are assumptions, not measurements.
_ASSUMED = {"dense": 0.7, "grouped": 0.5, "attention": 0.45, "memory": 80 * GB, "devices_per_node": 8}
_SHEETS = {  # FLOP/s; GB/s of the memory, of NVLink 4 or 3, and of InfiniBand
    "h100-8x": ({"bf16": 989e12, "fp32": 67e12}, 3350, 450, 50),
    "a100-8x": ({"bf16": 312e12, "fp32": 19.5e12}, 2039, 300, 25),
}
MACHINES = {
    name: Machine(
        *(name, peak_flops),
        memory_bandwidth=0.85 * memory * GB,
        intra=Link(0.8 * nvlink * GB, 5e-6),
        inter=Link(0.8 * infiniband * GB, 15e-6),
        source="data sheets and assumed fractions",
        **_ASSUMED,
    )
    for name, (peak_flops, memory, nvlink, infiniband) in _SHEETS.items()
}


def read_machine(name: str) -> Machine:
    """A named machine, or one from a file that `write_machine` or a person wrote."""
    if name in MACHINES:
        return MACHINES[name]
    if name == "cpu":
        raise UserError(
            "--machine cpu has no built-in figures: run with --calibrate FILE.json, give --machine FILE.json"
        )
    if not Path(name).is_file():
        raise UserError(f"--machine {name}: neither one of {', '.join(MACHINES)} nor a file of figures (--calibrate)")
    try:
        figures: dict[str, Any] = json.loads(Path(name).read_text())
        links = {key: Link(**figures.pop(key)) for key in ("intra", "inter")}
        collectives = {key: Link(**link) for key, link in figures.pop("collectives", {}).items()}
        if unknown := set(collectives) - set(COLLECTIVES):
            raise UserError(f"--machine {name}: unknown collective {min(unknown)}")
        return Machine(**links, collectives=collectives, **figures)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--machine {name}: no figures of a machine ({type(error).__name__}: {error})") from error


def write_machine(machine: Machine, file: Path) -> None:
    write_json(asdict(machine), file, indent=1)
