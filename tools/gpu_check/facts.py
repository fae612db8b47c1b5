"""Facts as lines of JSON, and what they are made of: times, memory, host waits, differences."""

import gc
import json
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GIB = 2**30


@dataclass
class Check:
    """Where a section runs, at which size, and what it has found.

    Args:
        device: a GPU, or the CPU, on which times say nothing.
        full: the sizes of real models; else toy ones, with which the same code ends in seconds on a CPU.
    """

    device: torch.device
    full: bool
    section: str = ""
    failed: list[str] = field(default_factory=list)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def say(self, fact: str, ok: bool | None = None, **values: Any) -> None:
        """Print a fact. `ok`: whether it is as it must be; None: a figure that nothing is claimed of."""
        line = {"section": self.section, "fact": fact, **({} if ok is None else {"ok": ok}), **values}
        print(json.dumps(line, default=str), flush=True)
        if ok is False:
            self.failed.append(f"{self.section}: {fact}")

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def ms(self, run: Callable[[], object], repeats: int = 10, warm_up: int = 3) -> float:
        """The median time of a run that is waited for."""
        for _ in range(warm_up):
            run()
        taken = []
        for _ in range(repeats):
            self.wait()
            began = time.perf_counter()
            run()
            self.wait()
            taken.append((time.perf_counter() - began) * 1e3)
        return round(statistics.median(taken), 3)

    def peak_gib(self, run: Callable[[], object]) -> float | None:
        """What a run allocates at most beyond what is there; None on a CPU."""
        gc.collect()
        if not self.gpu:
            run()
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.wait()
        return round((torch.cuda.max_memory_allocated() - before) / GIB, 3)

    @contextmanager
    def host_waits(self) -> Iterator[Counter[str]]:
        """Counts, by line of code, the calls that make the host wait for the device; torch tells of those it knows."""
        found: Counter[str] = Counter()
        if self.gpu:
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield found
            finally:
                if self.gpu:
                    torch.cuda.set_sync_debug_mode("default")
        for one in caught:
            if "synchroniz" in str(one.message):
                found[f"{_short(one.filename)}:{one.lineno}"] += 1

    def kernels(self, run: Callable[[], object], most: int) -> dict[str, Any]:
        """Device time of a run and its largest kernels: {busy_ms, launches, largest: {name: [ms, calls]}}."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.gpu else [])]) as profiled:
            run()
            self.wait()
        events = profiled.key_averages()
        own = {event.key: event.self_device_time_total if self.gpu else event.self_cpu_time_total for event in events}
        largest = sorted(events, key=lambda event: -own[event.key])[:most]
        return {
            "busy_ms": round(sum(own.values()) / 1e3, 2),
            "launches": sum(event.count for event in events if "LaunchKernel" in event.key),
            "largest": {event.key[:70]: [round(own[event.key] / 1e3, 3), event.count] for event in largest},
        }


def _short(file: str) -> str:
    for folder in (Path(place) for place in sys.path if place):
        if Path(file).is_relative_to(folder):
            return str(Path(file).relative_to(folder))
    return file


def differ(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over that of `theirs`, in float64; where theirs is zero, the norm of ours."""
    ours, theirs = ours.detach().double(), theirs.detach().double().to(ours.device)
    scale = theirs.norm().item() if theirs.numel() else 0.0
    return (ours - theirs).norm().item() / (scale or 1.0)
