"""Numbers that are computed from the reports: balance of the experts, averages over a window, memory, time left."""

import re
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ds_moe.monitor.reports import RoutingReport, StepReport


def relative_load(counts_LE: np.ndarray) -> np.ndarray:
    """Load divided by the fair share, (L, E) float64: 0 for a dead expert, NaN in a layer without assignments."""
    total_L1 = counts_LE.sum(axis=1, keepdims=True).astype(np.float64)
    total_L1[total_L1 == 0] = np.nan
    return counts_LE * counts_LE.shape[1] / total_L1


def max_vio(counts_LE: np.ndarray) -> float:
    """MaxVio = max_e load / mean load - 1 of each layer, averaged over the layers (Wang et al. 2024, arXiv 2408.15664).

    0 is perfect balance, E - 1 all tokens at one expert. Layers without assignments do not count; NaN if no other is.
    """
    load_LE = relative_load(counts_LE)
    load_LE = load_LE[~np.isnan(load_LE[:, 0])]
    return float((load_LE.max(axis=1) - 1).mean()) if len(load_LE) else float("nan")


def split_by_kind(counts_LE: np.ndarray, image_counts_LE: np.ndarray) -> dict[str, np.ndarray]:
    """The counts of all tokens, and if there are both text and image tokens, also those of each."""
    kinds = {"all": counts_LE}
    text_counts_LE = counts_LE - image_counts_LE
    if image_counts_LE.any() and text_counts_LE.any():
        kinds |= {"text": text_counts_LE, "image": image_counts_LE}
    return kinds


def mean_by_name(reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each value over the reports that have it."""
    values: dict[str, list[float]] = {}
    for report in reports:
        for name, value in report.items():
            values.setdefault(name, []).append(value)
    return {name: sum(each) / len(each) for name, each in values.items()}


def tag(kind: str) -> str:
    """Turn the name of a kind of record into a part of a TensorBoard tag."""
    return re.sub(r"[^\w.-]+", "_", kind)


def routing_scalars(report: RoutingReport) -> dict[str, float]:
    """The `moe/*` scalars of one routing report."""
    kinds = split_by_kind(report.counts_LE, report.image_counts_LE)
    scalars = {"moe/max_vio": max_vio(kinds.pop("all"))}
    scalars |= {f"moe/max_vio_{kind}": max_vio(counts_LE) for kind, counts_LE in kinds.items()}
    scalars |= {
        f"moe/max_vio_kind_{tag(kind)}": max_vio(n_LE) for kind, n_LE in report.kind_counts_LE.items() if n_LE.any()
    }
    if report.last_step_LE is not None:
        scalars["moe/max_vio_step"] = max_vio(report.last_step_LE)
    layers = relative_load(report.counts_LE).max(axis=1) - 1
    scalars |= {f"moe/max_vio_layer_{layer}": float(vio) for layer, vio in enumerate(layers) if not np.isnan(vio)}
    scalars["moe/entropy"] = report.entropy_L
    scalars["moe/dead_experts"] = float((report.counts_LE == 0).sum())
    scalars["moe/drop_rate"] = report.drop_rate
    scalars["moe/uncovered_tokens"] = report.uncovered
    if report.bias_norm is not None:
        scalars["moe/bias_norm"] = report.bias_norm
    if report.aux_loss is not None:
        scalars["moe/aux_loss"] = report.aux_loss
    return scalars


class DeadExperts:
    """Finds experts that got no token for `alarm_steps` optimizer steps.

    Each is reported once, and again only if it has had tokens in between.
    """

    def __init__(self, alarm_steps: int) -> None:
        self.alarm_steps = alarm_steps
        self._idle_LE: np.ndarray | None = None

    def newly_dead(self, counts_LE: np.ndarray, steps: int) -> list[tuple[int, int]]:
        """Add the counts of `steps` more steps; return (layer, expert) of those that now reach the limit."""
        before_LE = np.zeros(counts_LE.shape, np.int64) if self._idle_LE is None else self._idle_LE
        self._idle_LE = np.where(counts_LE == 0, before_LE + steps, 0)
        dead_LE = (before_LE < self.alarm_steps) & (self._idle_LE >= self.alarm_steps)
        return [(int(layer), int(expert)) for layer, expert in np.argwhere(dead_LE)]


def window_scalars(steps: Sequence[StepReport], peak_tokens_per_s: float | None) -> dict[str, float]:
    """The `train/*` and `perf/*` scalars of the steps since the last log step.

    Rates are over the time of the steps alone, so that evaluations and checkpoints in between do not lower them. MFU,
    in 0 ... 1 (Chowdhery et al. 2022, PaLM), needs the rate at the hardware's peak.
    """
    taken = [step for step in steps if step.taken] or steps
    seconds = max(sum(step.step_s for step in steps), 1e-9)
    tokens_per_s = sum(step.tokens for step in steps) / seconds
    scalars = {
        "train/loss": sum(step.loss for step in taken) / len(taken),
        "train/lr": steps[-1].lr,
        "train/grad_norm": sum(step.grad_norm for step in taken) / len(taken),
        "train/skipped_steps": sum(not step.taken for step in steps),
        "perf/tokens_per_s": tokens_per_s,
        "perf/step_s": seconds / len(steps),
        "perf/data_wait_frac": sum(step.data_wait_s for step in steps) / seconds,
        "perf/mem_gib": peak_memory_gib(),
    }
    fills = [step.fill for step in steps if step.fill is not None]
    if fills:
        scalars["perf/packing_fill"] = sum(fills) / len(fills)
    if any(step.sent_bytes for step in steps):
        scalars["perf/ep_sent_mib"] = sum(step.sent_bytes for step in steps) / len(steps) / 2**20
    of_task = mean_by_name([step.task for step in steps])
    scalars |= {f"{steps[-1].task_name}/{name}": value for name, value in of_task.items()}
    if peak_tokens_per_s:
        scalars["perf/mfu"] = tokens_per_s / peak_tokens_per_s
    return scalars


def peak_memory_gib() -> float:
    """Peak memory of this process in GiB: on the accelerator if one is in use, else resident in main memory."""
    import torch

    if torch.accelerator.is_available():
        allocated = torch.accelerator.max_memory_allocated()
        if allocated:
            return allocated / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, Linux KiB


@dataclass
class Clock:
    """Estimates the time left from the wall time between steps, which includes evaluations and checkpoints.

    The first step does not count, because it has costs of its own (compilation, warm-up of the allocator).
    """

    total_steps: int
    first_step: int | None = None
    first_s: float = 0.0

    def seconds_left(self, step: int, now_s: float, step_s: float) -> float:
        """Estimated seconds from `step` to the end. After the first step, its time `step_s` is the only estimate."""
        if self.first_step is None:
            self.first_step, self.first_s = step, now_s
        done = step - self.first_step
        pace_s = (now_s - self.first_s) / done if done > 0 else step_s
        return pace_s * max(self.total_steps - step, 0)
