"""Which kernels compute the experts, and what CPU ranks get from the launcher."""

import os
from collections.abc import Iterator

from ds_moe.doctor.case import Case, Finding
from ds_moe.engine.cpu import cpu_settings


def check_kernels(case: Case) -> Iterator[Finding]:
    """The backend that computes the experts, and whether this environment can run it."""
    config = case.config
    if config.moe is None:
        return
    import torch

    from ds_moe.config.deepspeed import precision
    from ds_moe.moe.backends import BACKENDS, choose_backend

    kind, where = config.moe.experts.backend, config.at("moe.experts.backend")
    on_cpu = case.device.on_cpu
    if kind == "reference":
        yield Finding("warning", f"{where}: moe.experts.backend reference loops over the experts; use auto")
        return
    if not (on_cpu or torch.cuda.is_available()):
        yield Finding("ok", f"experts: backend {kind}; what it needs is looked for where the job runs")
        return
    device = "cpu" if on_cpu else "cuda"
    if kind == "auto":
        dtype = torch.bfloat16 if precision(config, on_cpu) == "bf16" else torch.float32
        chosen, why = choose_backend(device, dtype)
        yield Finding("ok", f"experts: backend {chosen} (auto: {why})")
        return
    obstacle = BACKENDS[kind].obstacle(device)
    if obstacle is not None:
        yield Finding("error", f"{where}: moe.experts.backend {kind}: {obstacle}; or use auto")
        return
    yield Finding("ok", f"experts: backend {kind}: {BACKENDS[kind].made_of()}")


def check_cores(case: Case) -> Iterator[Finding]:
    """Threads and allocator of CPU ranks, as `ds-moe train` and the launch scripts set them."""
    if not case.device.on_cpu:
        return
    settings, cores = cpu_settings(case.world_size), len(os.sched_getaffinity(0))
    shown = ", ".join(f"{name}={value}" for name, value in settings.items() if name.startswith(("OMP", "MALLOC")))
    threads = settings["OMP_NUM_THREADS"]
    yield Finding("ok", f"CPU ranks get {shown}: a share of the {cores} cores each, and freed memory is kept")
    if threads.isdecimal() and int(threads) * case.world_size > max(cores, case.world_size):
        text = f"OMP_NUM_THREADS={threads} x {case.world_size} ranks is more than {cores} cores"
        yield Finding("warning", f"{text}: threads that wait spin, and a run can be 30 times slower; unset it")
