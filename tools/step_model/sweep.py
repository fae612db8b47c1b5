"""Time and memory of one topology, of every EP size of some numbers of devices, the best of each, and their figure."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from transformers import PreTrainedModel, Qwen3MoeConfig

from ds_moe.config.deepspeed import resolve_deepspeed, zero_plan
from ds_moe.doctor.plans import Plan, run_of
from ds_moe.errors import UserError
from ds_moe.memory.predict import BUSY, predict
from ds_moe.models.load import build_outline
from ds_moe.monitor.heatmap import FAINT, INK
from ds_moe.monitor.plot import finish_axes
from tools.results import save
from tools.step_model.costs import Topology
from tools.step_model.machines import Machine
from tools.step_model.shapes import KEYS, Decoder
from tools.step_model.step_time import Estimate, estimate

DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Point:
    topology: Topology
    estimate: Estimate
    memory: dict[str, float]
    fits: bool


def memory(topology: Topology, decoder: Decoder, machine: Machine) -> dict[str, float]:
    """Bytes by purpose at the moment of a step that needs most, their sum the peak; rows are routed evenly."""
    model, on_cpu = outline(decoder), machine.name == "cpu"
    settings = {
        # What a micro-step keeps depends on its tokens, not on how they are cut into sequences.
        "data.max_length": topology.tokens,
        "train.gradient_checkpointing": topology.checkpointing,
        "train.precision": topology.dtype,
    }
    plan = Plan(topology.world, topology.ep_size, topology.zero_stage)
    run = run_of(plan, decoder.name, model.config, settings)
    run.train.global_batch_size *= topology.accumulation
    ds = resolve_deepspeed(run, topology.world, on_cpu, decoder.D)
    found = predict(model, run, zero_plan(ds), topology.world, on_cpu, streams_weights=False)
    return {**found.device, "runtime": machine.runtime}


def fits(parts: dict[str, float], device_bytes: float) -> bool:
    return sum(parts.values()) <= BUSY * device_bytes


@functools.cache
def outline(decoder: Decoder) -> PreTrainedModel:
    """The decoder in transformers, without storage."""
    keys = {key: getattr(decoder, field) for field, key in KEYS.items()}
    dense = {"mlp_only_layers": list(range(decoder.dense_layers)), "intermediate_size": decoder.dense_F}
    keys |= {"head_dim": decoder.head_dim, "num_experts": decoder.E, "tie_word_embeddings": decoder.tied}
    return build_outline(Qwen3MoeConfig(**keys, **dense))


def point(topology: Topology, decoder: Decoder, machine: Machine) -> Point:
    figures = estimate(topology, decoder, machine)
    parts = memory(topology, decoder, machine)
    return Point(topology, figures, parts, fits(parts, machine.memory))


def sweep(
    topology: Topology, decoder: Decoder, machine: Machine, devices: Sequence[int] = DEVICES
) -> dict[int, list[Point]]:
    """Points of every EP size for each number of devices; all else as in `topology`."""
    points = {}
    for count in devices:
        per_node = min(count, topology.devices_per_node)
        if count < 1 or count % per_node:
            raise UserError(f"--devices {count}: must fill nodes of {per_node}")
        placed = replace(topology, nodes=count // per_node, devices_per_node=per_node)
        sizes = [size for size in range(1, decoder.E + 1) if decoder.E % size == count % size == 0]
        points[count] = [point(replace(placed, ep_size=size), decoder, machine) for size in sizes]
    return points


def best(points: list[Point]) -> Point | None:
    """The fastest that fits the memory; None if none does."""
    return max((p for p in points if p.fits), key=lambda p: p.estimate.tokens_per_s, default=None)


def write_figure(points: dict[int, list[Point]], title: str, file: Path) -> None:
    """PNG: tokens/s of one device against EP size, a line for each number of devices; hollow: exceeds the memory."""
    figure = Figure(figsize=(7.6, 4.6), dpi=150, facecolor="white", layout="constrained")
    axes = figure.subplots()
    colors = colormaps["viridis"].resampled(max(2, len(points) + 1))  # its last, a pale yellow, stays unused
    for position, (count, row) in enumerate(points.items()):
        color = colors(position)
        sizes = [p.topology.ep_size for p in row]
        speeds = [p.estimate.tokens_per_s / count for p in row]
        axes.plot(sizes, speeds, color=color, linewidth=1.5, label=str(count))
        for size, speed, p in zip(sizes, speeds, row, strict=True):
            axes.plot(size, speed, "o", color=color, markersize=5, markerfacecolor=color if p.fits else "white")
    ticks = sorted({p.topology.ep_size for row in points.values() for p in row})
    finish_axes(axes, title, "EP size (ranks that share one copy of the experts)")
    axes.set_xscale("log", base=2)
    axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    axes.set_ylabel("estimated tokens/s of one device", fontsize=9, color=INK)
    handles, labels = axes.get_legend_handles_labels()
    handles.append(Line2D([], [], color=FAINT, marker="o", markerfacecolor="white", linestyle="none"))
    labels.append("exceeds the\nmemory")
    figure.legend(handles, labels, loc="outside right upper", title="devices", frameon=False, fontsize=8.5)
    save(figure, file)
