"""Run a launcher, and leave none of its ranks behind."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil  # DeepSpeed depends on it

from ds_moe.engine import cpu as ops
from ds_moe.launcher.command import Launch
from ds_moe.launcher.ranks import ask_ranks, kill_elsewhere

GRACE_S = 30  # seconds that the launcher may take to end once its ranks have ended
LEFT_S = 5  # seconds that ranks may take to end once their launcher has ended
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Exit codes after which no run is started again: it is complete, would fail the same way, or a signal stopped it.
FINAL = {0, 2, *(128 + number for number in (*STOPPING, signal.SIGUSR1))}


def start(launch: Launch, stop_within_s: float) -> int:
    """Run a launch, given `train.stop_within_s` of the run, and return its exit code.

    CPU ranks need an op that DeepSpeed compiles: it is built first, because they would wait for it without a word.
    """
    environment = {**os.environ, **launch.settings}
    if "TORCH_EXTENSIONS_DIR" in launch.settings and not ops.ready(Path(launch.settings["TORCH_EXTENSIONS_DIR"])):
        code = run_group([sys.executable, "-m", "ds_moe.engine.cpu"], environment)
        if code:
            return code
    return run_group(launch.command, environment, stop_within_s)


def run_group(command: list[str], environment: dict[str, str], stop_within_s: float = 0.0) -> int:
    """Run a command as a process group of its own, of which nothing survives this call, and return the exit code.

    A SIGINT, SIGTERM or SIGHUP that this process receives is sent to the ranks, on other hosts too, as a SIGTERM, and
    not to DeepSpeed's launcher, which would end the ranks half a minute after its own. The ranks have `stop_within_s`
    seconds to save a checkpoint; then, or at a second signal, ranks on other hosts get a SIGKILL, the whole group here
    gets a SIGTERM and what is left of it a SIGKILL. The exit code is then 128 + the signal, as in shells.
    """
    received: list[int] = []
    heeded = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]  # nohup stays nohup
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in heeded}
    try:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and not received:
            time.sleep(0.1)
        if received and stop_within_s and ask_ranks(process.pid):
            deadline = time.monotonic() + stop_within_s + GRACE_S
            while process.poll() is None and len(received) == 1 and time.monotonic() < deadline:
                time.sleep(0.1)
        grace_s = LEFT_S if process.poll() is not None else GRACE_S
        if received and process.poll() is None and kill_elsewhere(process.pid):
            grace_s = 0
            with suppress(subprocess.TimeoutExpired):
                process.wait(LEFT_S)
        _end_group(process.pid, grace_s)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def _end_group(group: int, grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    with suppress(ProcessLookupError):  # the group is empty, as after every run that went well
        os.killpg(group, signal.SIGTERM)
        while _alive(group) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)


def _alive(group: int) -> bool:
    """Whether a process of the group runs. A zombie does not count: in a container nobody may ever collect it."""
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False
