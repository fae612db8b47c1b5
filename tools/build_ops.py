"""Build DeepSpeed's CPU communication op once, ahead of the first run.

DeepSpeed compiles `deepspeed_shm_comm` the first time a CPU process group starts: about 100 s in which a run looks
hung. This script does it up front, says so, and clears the lock that a killed build leaves behind (with it, every
later run would wait for ever).

    python tools/build_ops.py        respects TORCH_EXTENSIONS_DIR; does nothing when the op is up to date
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

OP = "deepspeed_shm_comm"


def lock_holder(lock: Path) -> int | None:
    """Process id of the build that holds `lock`, or None. torch keeps the file open for as long as it builds.

    Only processes of this machine are seen: on a home folder shared by several machines, give each its own
    TORCH_EXTENSIONS_DIR.
    """
    return next((pid for pid in psutil.pids() if str(lock) in _open_paths(pid)), None)


def _open_paths(pid: int) -> Iterator[str]:
    """What process `pid` has open; nothing for one that has ended or belongs to another user."""
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed between the listing and the look
                yield os.readlink(descriptor)


def remove_stale_lock(extensions: Path) -> bool:
    """Remove the build lock under `extensions` when no process holds it. True if there was a stale one."""
    lock = extensions.resolve() / OP / "lock"
    if not lock.exists() or lock_holder(lock) is not None:
        return False
    lock.unlink(missing_ok=True)
    return True


def extensions_dir() -> Path:
    """Where torch will look for the op: TORCH_EXTENSIONS_DIR, else torch's own default."""
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(root)
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(OP, verbose=False)).parent


def main() -> int:
    # The op belongs to the CPU accelerator; on a machine with GPUs the CPU tests still use it.
    os.environ["DS_ACCELERATOR"] = "cpu"
    # torch looks for `ninja` on PATH; the one pip installed lies beside this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        print(
            f"build_ops: no C++ compiler: `{compiler}` is not on PATH. DeepSpeed compiles its CPU op "
            "with it; install one (Debian/Ubuntu: apt-get install g++) or set CXX, then run this again.",
            file=sys.stderr,
        )
        return 1
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        print(
            f"build_ops: {header} is missing: install the headers of this Python (Debian/Ubuntu: apt-get install "
            "python3-dev), then run this again.",
            file=sys.stderr,
        )
        return 1
    extensions = extensions_dir()
    built = (extensions / OP / f"{OP}.so").exists()
    lock = extensions.resolve() / OP / "lock"
    if remove_stale_lock(extensions):
        print(f"build_ops: removed the lock of a killed build: {lock}", flush=True)
    if lock.exists():
        print(f"build_ops: process {lock_holder(lock)} is building {OP}; waiting for it ...", flush=True)
    elif not built:
        print(f"build_ops: compiling DeepSpeed's {OP} (once; 30 to 100 s on 2 free cores) ...", flush=True)
    start = time.monotonic()

    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    print(f"build_ops: {OP} ready after {time.monotonic() - start:.0f} s in {extensions}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
