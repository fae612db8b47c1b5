"""Start the ranks of a run under DeepSpeed's launcher, and leave none behind."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil  # DeepSpeed depends on it

from ds_moe.config.deepspeed import trains_on_cpu
from ds_moe.engine import cpu as ops
from ds_moe.engine.cpu import cpu_settings
from ds_moe.errors import UserError

GRACE_S = 30  # seconds that the launcher may take to end once its ranks have ended
LEFT_S = 5  # seconds that ranks may take to end once their launcher has ended
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Exit codes after which no run is started again: it is complete, would fail the same way, or a signal stopped it.
FINAL = {0, 2, *(128 + number for number in (*STOPPING, signal.SIGUSR1))}


@dataclass(frozen=True)
class Launch:
    """The argument list of DeepSpeed's launcher, and the environment variables it gets beside the caller's own."""

    command: list[str]
    settings: dict[str, str]

    def __str__(self) -> str:
        """One line that can be pasted into a shell."""
        settings = ["env", *(f"{name}={value}" for name, value in self.settings.items())] if self.settings else []
        return shlex.join([*settings, *self.command])


def plan(
    run: str, overrides: list[str], nproc: int | None = None, hostfile: str | None = None, port: int | None = None
) -> Launch:
    """How to start a run on this machine, or on those of a hostfile.

    Args:
        nproc: ranks a machine. None: every accelerator (of the hostfile: every slot), or one CPU rank.
        port: where rank 0 listens. None: MASTER_PORT, else a free port, or DeepSpeed's default (29500) with a hostfile.

    Raises:
        UserError: DeepSpeed or the hostfile is missing, or there are fewer accelerators than ranks.
    """
    port = port or _port_from_environment()
    settings: dict[str, str] = {}
    if hostfile is not None:
        if not Path(hostfile).is_file():  # DeepSpeed would train on this machine alone
            raise UserError(f"--hostfile {hostfile}: no such file")
        words = ["--hostfile", hostfile]
    elif trains_on_cpu():
        settings = cpu_settings(nproc or 1)
        words = ["--num_accelerators", str(nproc or 1)]
    else:
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        settings, words = choose_devices(nproc, torch.accelerator.device_count(), visible)
    if hostfile is not None and nproc:
        words += ["--num_accelerators", str(nproc)]
    if hostfile is not None:
        run, *overrides = map(for_remote_shell, [run, *overrides])
    if hostfile is None or port:
        words += ["--master_port", str(port or _free_port())]
    options = ["--quiet", "--no_local_rank", "--module", "ds_moe.train"]
    return Launch([_deepspeed(), *words, *options, run, *overrides], settings)


def for_remote_shell(word: str) -> str:
    """Quote a word so that it reaches the shells of the other machines unchanged.

    DeepSpeed's pdsh launcher puts words with a space between double quotes, and escapes double quotes inside them; it
    leaves every other word as it is.
    """
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def choose_devices(nproc: int | None, devices: int, visible: str) -> tuple[dict[str, str], list[str]]:
    """(environment, launcher options) for `nproc` ranks on a machine that shows `devices` accelerators.

    The ranks get the first `nproc` devices of CUDA_VISIBLE_DEVICES (`visible`), or all of them. DeepSpeed's launcher
    starts a rank on each device that the variable lists, but ignores the variable when it is told a number of ranks.

    Raises:
        UserError: there are fewer devices than ranks, or the variable holds something else than device numbers.
    """
    if (nproc or 1) > devices:
        raise UserError(
            f"--nproc {nproc or 1}: only {devices} accelerator(s) visible here; DS_ACCELERATOR=cpu trains on the CPU"
        )
    if not visible:
        return {}, ["--num_accelerators", str(nproc)] if nproc else []
    if not re.fullmatch(r"\d+(,\d+)*", visible):
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible}: DeepSpeed's launcher takes device numbers only, such as 0,1")
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[:nproc])}, []


def _deepspeed() -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    launcher = shutil.which("deepspeed", path=path)
    if launcher is None:
        raise UserError("there is no `deepspeed` beside this Python or on PATH: install DeepSpeed in this environment")
    return launcher


def _port_from_environment() -> int | None:
    text = os.environ.get("MASTER_PORT", "")
    if text and not text.isdecimal():
        raise UserError(f"MASTER_PORT={text} is not a port number")
    return int(text) if text else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(launch: Launch, stop_within_s: float) -> int:
    """Run a launch, and return its exit code. CPU ranks need an op that DeepSpeed compiles: where it is missing it is
    built first, because the ranks would wait for it without a word.

    Args:
        stop_within_s: `train.stop_within_s` of the run, in seconds.
    """
    environment = {**os.environ, **launch.settings}
    if "TORCH_EXTENSIONS_DIR" in launch.settings and not ops.ready(Path(launch.settings["TORCH_EXTENSIONS_DIR"])):
        code = run_group([sys.executable, "-m", "ds_moe.engine.cpu"], environment)
        if code:
            return code
    return run_group(launch.command, environment, stop_within_s)


def run_group(command: list[str], environment: dict[str, str], stop_within_s: float = 0.0) -> int:
    """Run a command as a process group of its own, of which nothing survives this call, and return the exit code.

    A SIGINT, SIGTERM or SIGHUP that this process receives is sent to the ranks as a SIGTERM, and not to DeepSpeed's
    launcher, which would end the ranks half a minute after its own. The ranks have `stop_within_s` seconds to save a
    checkpoint; then, or at a second signal, the whole group gets a SIGTERM and what is left of it a SIGKILL. The exit
    code is then 128 + the signal, as in shells.
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
        _end_group(process.pid, LEFT_S if process.poll() is not None else GRACE_S)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def ask_ranks(launcher: int) -> int:
    """Send SIGTERM to the ranks that a launcher has started on this host, and return their number."""
    asked = 0
    for process in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "RANK" in process.environ():
                process.terminate()
                asked += 1
    return asked


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
