"""All processes below one, found and killed, wherever they went."""

import os
import signal
import time
from contextlib import suppress

KILLED_S = 10.0  # for killed processes to be gone
SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36  # options of `prctl`


def kill_children() -> None:
    """Kill what is below this process until nothing is left: orphans of what dies become its own children."""
    deadline = time.monotonic() + KILLED_S
    while (found := below(os.getpid())) and time.monotonic() < deadline:
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.002)


def below(process: int) -> list[int]:
    """All processes that have `process` as an ancestor."""
    of_parent: dict[int, list[int]] = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:
            parent = int(stat.read().rpartition(b")")[2].split()[1])
            of_parent.setdefault(parent, []).append(int(name))
    found = of_parent.get(process, [])
    for one in found:  # grows while it is read
        found += of_parent.get(one, [])
    return found


def prctl(option: int, value: int) -> None:
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
