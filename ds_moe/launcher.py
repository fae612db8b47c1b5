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

GRACE_S = 30  # seconds that a launcher has to end after its ranks
LEFT_S = 5  # seconds that ranks have to end after their launcher
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Codes after which a run is not started again: complete, wrong in the same way next time, or stopped by a signal.
FINAL = {0, 2, *(128 + number for number in (*STOPPING, signal.SIGUSR1))}


@dataclass(frozen=True)
class Launch:
    """A launcher's argument list and the environment variables it gets beside the caller's own."""

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
        port: of rank 0. None: MASTER_PORT, else a free one, or DeepSpeed's default (29500) with a hostfile.

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
    """A word as DeepSpeed's pdsh launcher must get it so that the shells of the other machines see it unchanged: it
    puts words that hold a space between double quotes, which it escapes in them, and no others."""
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def choose_devices(nproc: int | None, devices: int, visible: str) -> tuple[dict[str, str], list[str]]:
    """(settings, launcher options) for `nproc` ranks on a machine that shows `devices` accelerators.

    Of a CUDA_VISIBLE_DEVICES (`visible`) the first `nproc` are taken. DeepSpeed ignores that variable where it gets
    a number of ranks, and without one starts a rank on every device of it.
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
    """Build what the ranks would otherwise wait for without a word, then run them; the launcher's exit code.

    Args:
        stop_within_s: `train.stop_within_s` of the run.
    """
    environment = {**os.environ, **launch.settings}
    if "TORCH_EXTENSIONS_DIR" in launch.settings and not ops.ready(Path(launch.settings["TORCH_EXTENSIONS_DIR"])):
        code = run_group([sys.executable, "-m", "ds_moe.engine.cpu"], environment)
        if code:
            return code
    return run_group(launch.command, environment, stop_within_s)


def run_group(command: list[str], environment: dict[str, str], stop_within_s: float = 0.0) -> int:
    """Run a command as a process group of its own, of which nothing survives this call; the exit code.

    SIGINT, SIGTERM and SIGHUP go to the ranks, as a SIGTERM, and to them alone: DeepSpeed's launcher would end them
    half a minute after its own. They have `stop_within_s` for a checkpoint; then, or at a second signal, all of the
    group gets a SIGTERM, and what is left a SIGKILL. The code is then 128 + the signal, as in shells.
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
    """Send SIGTERM to the ranks on this host that a launcher has started; how many there are."""
    asked = 0
    for process in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "RANK" in process.environ():
                process.terminate()
                asked += 1
    return asked


def _end_group(group: int, grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    with suppress(ProcessLookupError):  # it is empty, as after every run that went well
        os.killpg(group, signal.SIGTERM)
        while _alive(group) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)


def _alive(group: int) -> bool:
    """Whether a process of the group runs. A zombie does not: in a container nobody may ever collect it."""
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False
