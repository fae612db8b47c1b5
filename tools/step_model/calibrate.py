"""Measure the figures of this machine's CPU for the step model: several processes at once, as ranks run.

Each figure is the median of several repetitions in the slowest process. Collectives are gloo's; their bandwidth is
fitted to the formulas that the estimate uses. A busy machine gives low figures: measure when nothing else runs.
"""

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from ds_moe.engine.cpu import cpu_settings
from ds_moe.errors import UserError
from tools.step_model.machines import COLLECTIVES, Link, Machine, read_machine, write_machine

SIDE = 1024  # of dense GEMMs
ROWS, WIDTH_IN, WIDTH_OUT, EXPERTS = 2048, 256, 768, 64  # of grouped GEMMs: tiny-64 at 1,024 tokens a rank
SEQUENCE, HEADS, HEAD_DIM = 1024, 8, 32  # of attention scores
COPIED = 2**22  # elements of a copied tensor
SMALL, LARGE = 2**8, 2**21  # elements of a collective
ADAM_ELEMENTS = 2**22


def slowest_s(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of `run` in the slowest process, after a warm-up; all processes start together."""
    taken = []
    for _ in range(repeats + 1):
        dist.barrier()
        began_s = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began_s)
    median_s = torch.tensor(statistics.median(taken[1:]), dtype=torch.float64)
    dist.all_reduce(median_s, dist.ReduceOp.MAX)
    return median_s.item()


def gemm_flops(repeats: int) -> tuple[float, float, float]:
    """FLOP/s of dense GEMMs, of grouped GEMMs and of causal attention scores, fp32."""
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    dense = 2 * SIDE**3 / slowest_s(lambda: a @ b, repeats)
    rows, weights = torch.randn(ROWS, WIDTH_IN), torch.randn(EXPERTS, WIDTH_IN, WIDTH_OUT)
    ends = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * (ROWS // EXPERTS)
    grouped_s = slowest_s(lambda: F.grouped_mm(rows, weights, offs=ends), repeats)
    q, k, v = torch.randn(3, 1, HEADS, SEQUENCE, HEAD_DIM)
    attention_s = slowest_s(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), repeats)
    attention = 4 * SEQUENCE * (SEQUENCE + 1) / 2 * HEADS * HEAD_DIM
    return dense, 2 * ROWS * WIDTH_IN * WIDTH_OUT / grouped_s, attention / attention_s


def collective(name: str, elements: int) -> tuple[Callable[[], object], float]:
    """A call on fp32 tensors of `elements` in total, and the bytes a rank moves in it as `links` counts."""
    ranks = dist.get_world_size()
    whole, part = torch.ones(elements), torch.ones(elements // ranks)
    again = torch.empty_like(whole)
    calls: dict[str, Callable[[], object]] = {
        "all_to_all": lambda: dist.all_to_all_single(again, whole),
        "all_gather": lambda: dist.all_gather_into_tensor(again, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "all_reduce": lambda: dist.all_reduce(whole),
    }
    moved = 4 * elements * (ranks - 1) / ranks
    return calls[name], 2 * moved if name == "all_reduce" else moved


def link(name: str, repeats: int) -> Link:
    """Latency from a small message, bandwidth from a large one."""
    (small, _), (large, moved) = collective(name, SMALL), collective(name, LARGE)
    steps = (dist.get_world_size() - 1).bit_length() * (2 if name == "all_reduce" else 1)
    latency_s = slowest_s(small, repeats) / steps
    large_s = slowest_s(large, repeats)
    return Link(moved / max(large_s - latency_s * steps, 0.1 * large_s), latency_s)


def _rank(rank: int, processes: int, folder: str, repeats: int) -> None:
    # Two names that DeepSpeed calls too are deprecated in torch 2.13, and their successors unknown to 2.11.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=processes)
    dense, grouped, attention = gemm_flops(repeats)
    copied = torch.ones(COPIED)
    bandwidth = 8 * COPIED / slowest_s(lambda: copied.clone(), repeats)
    weight = torch.zeros(ADAM_ELEMENTS, requires_grad=True)
    weight.grad = torch.ones(ADAM_ELEMENTS)
    adam_s = slowest_s(torch.optim.AdamW([weight], fused=True).step, repeats)  # torch's, which runs on CPUs use
    links = {name: link(name, repeats) for name in COLLECTIVES}
    machine = Machine(
        "cpu",
        {"fp32": dense},
        dense=1.0,
        grouped=grouped / dense,
        attention=attention / dense,
        memory_bandwidth=bandwidth,
        memory=psutil.virtual_memory().total / processes,
        runtime=2**29,
        intra=links["all_to_all"],
        inter=links["all_to_all"],  # there is no second machine to measure
        devices_per_node=processes,
        adam_bytes=adam_s / ADAM_ELEMENTS * bandwidth,
        collectives=links,
        source=f"measured: {processes} processes of {torch.get_num_threads()} threads, torch {torch.__version__}",
    )
    if rank == 0:
        write_machine(machine, Path(folder) / "machine.json")
    dist.barrier()
    # Not through the interpreter's end: a thread of gloo's that frees its last tensor then aborts the process, and
    # `destroy_process_group` does not always end the threads (torch 2.13; pytorch/pytorch#179291).
    os._exit(0)


def calibrate(processes: int = 2, repeats: int = 7) -> Machine:
    """Figures of this CPU in fp32; a device is one process, with the threads and allocator of `ds-moe train`."""
    if processes < 2:
        raise UserError(f"--processes {processes}: at least 2, to measure what they exchange")
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.dict(os.environ, cpu_settings(processes)):  # which the processes are started with
            mp.spawn(_rank, (processes, folder, repeats), nprocs=processes)
        machine = read_machine(f"{folder}/machine.json")
    return replace(machine, source=f"{machine.source}, load average {os.getloadavg()[0]:.1f}")
