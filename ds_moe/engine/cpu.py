"""Builds `deepspeed_shm_comm`, the op that DeepSpeed compiles for CPU runs, and sets the environment of CPU ranks.

Left to DeepSpeed, the first CPU process group compiles the op: the run looks hung for about 100 s, and a killed build
leaves a lock that every later run waits for, without a message. `python -m ds_moe.engine.cpu` builds it beforehand.
"""

import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil  # DeepSpeed depends on it

from ds_moe.errors import UserError

OP = "deepspeed_shm_comm"
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of the container that this process is in


def use_environment() -> None:
    """Let this process and its children find the ops that were compiled into this Python environment.

    The environment's own ninja must come first on PATH: another version would discard the build log and compile
    everything again.
    """
    compiled = Path(sys.prefix, "torch_extensions")
    if compiled.is_dir():
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(compiled))
        _put_first_on_path(Path(sys.executable).parent)


def _put_first_on_path(folder: Path) -> None:
    path = os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != str(folder):
        os.environ["PATH"] = f"{folder}{os.pathsep}{path}"


def extensions_dir() -> Path:
    """The folder of compiled ops: TORCH_EXTENSIONS_DIR, else one in this virtual environment, else torch's default."""
    if named := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(named)
    if sys.prefix != sys.base_prefix:
        return Path(sys.prefix, "torch_extensions")
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(OP, verbose=False)).parent


def ready(extensions: Path) -> bool:
    """Whether the op has been built in `extensions`, and there is no lock, held or left behind."""
    return (extensions / OP / f"{OP}.so").exists() and not (extensions / OP / "lock").exists()


def lock_holder(lock: Path) -> int | None:
    """The process of this machine that holds `lock`, or None. torch keeps the file open as long as it builds.

    Machines that share a home folder need a TORCH_EXTENSIONS_DIR each.
    """
    return next((pid for pid in psutil.pids() if str(lock) in _open_paths(pid)), None)


def _open_paths(pid: int) -> Iterator[str]:
    """The files that a process has open; none if it has ended or belongs to another user."""
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # the process has closed this file in the meantime
                yield os.readlink(descriptor)


def remove_stale_lock(extensions: Path) -> bool:
    """Remove the build lock in `extensions` if no process holds it. Returns whether there was such a lock."""
    lock = extensions.resolve() / OP / "lock"
    if not lock.exists() or lock_holder(lock) is not None:
        return False
    lock.unlink(missing_ok=True)
    return True


def build() -> None:
    """Build the op unless it is up to date, and say first how long that takes.

    Raises `UserError` where the compiler or the headers of this Python are missing.
    """
    _check_tools()
    extensions = extensions_dir()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    os.environ["DS_ACCELERATOR"] = "cpu"  # the op is the CPU accelerator's; a machine with GPUs needs it for CPU runs
    _put_first_on_path(Path(sys.executable).parent)
    if remove_stale_lock(extensions):
        print(f"removed the lock that a killed build left in {extensions / OP}", flush=True)
    lock = extensions.resolve() / OP / "lock"
    if lock.exists():
        print(f"waiting for process {lock_holder(lock)}, which is building DeepSpeed's {OP} ...", flush=True)
    else:
        again = "checking" if ready(extensions) else "compiling"
        print(f"{again} DeepSpeed's {OP} (compiling takes 30 to 100 s on 2 cores, once) ...", flush=True)
    start = time.monotonic()

    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    print(f"{OP} is ready after {time.monotonic() - start:.0f} s in {extensions}", flush=True)


def _check_tools() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"no C++ compiler: `{compiler}` is not on PATH. DeepSpeed compiles its CPU op with it; install one "
            "(Debian/Ubuntu: apt-get install g++) or set CXX, then run this again"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise UserError(
            f"{header} is missing: install the headers of this Python (Debian/Ubuntu: apt-get install python3-dev), "
            "then run this again"
        )


def cores() -> int:
    """CPUs of this job on this machine: where it may run, or fewer by SLURM's word or a container's quota."""
    counts = [len(os.sched_getaffinity(0))]
    if (given := os.environ.get("SLURM_CPUS_ON_NODE", "")).isdecimal():
        counts.append(int(given))
    with suppress(OSError, ValueError):  # no control groups of version 2 here; no quota, "max"
        quota, period = CPU_QUOTA.read_text().split()
        counts.append(int(quota) // int(period))
    return max(1, min(counts))


def threads_of_rank(ranks: int) -> int:
    """Threads of each of `ranks` on this machine."""
    return max(1, cores() // ranks)


def share_cores() -> None:
    """Give this rank its share of this machine's cores, unless the user has chosen OMP_NUM_THREADS.

    Left alone, each rank under DeepSpeed's launcher takes all of them, and each of several under torchrun a single one.
    """
    import torch

    from ds_moe.distributed import ranks_of_host

    ranks = ranks_of_host()
    if ranks is None or _threads_are_chosen():
        return
    threads = threads_of_rank(ranks)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for ops that bring an OpenMP of their own, and for children


def _threads_are_chosen() -> bool:
    chosen = bool(os.environ.get("OMP_NUM_THREADS"))
    if chosen and "TORCHELASTIC_RUN_ID" in os.environ:
        with suppress(psutil.Error):  # torchrun has put a 1 there itself, if it was not started with any
            return bool(psutil.Process(os.getppid()).environ().get("OMP_NUM_THREADS"))
    return chosen


def cpu_settings(ranks: int) -> dict[str, str]:
    """The environment of CPU ranks that share this machine's cores. Variables that the user has set are kept.

    The MALLOC_ variables keep glibc from returning the experts' buffers to the system after every step, which would
    cost page faults.
    """
    malloc = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**35)}
    settings = {"OMP_NUM_THREADS": str(threads_of_rank(ranks)), **malloc}
    chosen = {name: os.environ.get(name) or value for name, value in settings.items()}
    return {"DS_ACCELERATOR": "cpu", **chosen, "TORCH_EXTENSIONS_DIR": str(extensions_dir())}


if __name__ == "__main__":
    try:
        build()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
