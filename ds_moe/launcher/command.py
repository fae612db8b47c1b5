"""The command that starts the ranks of a run: DeepSpeed's launcher, here or on the hosts of a hostfile."""

import os
import re
import shlex
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from ds_moe.config.deepspeed import trains_on_cpu
from ds_moe.engine.cpu import cpu_settings
from ds_moe.errors import UserError
from ds_moe.launcher.hostfile import is_here, read_hostfile


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
    run: str,
    overrides: list[str],
    nproc: int | None = None,
    hostfile: str | None = None,
    port: int | None = None,
    module: str = "ds_moe.train",
) -> Launch:
    """How to start a run on this machine, or on those of a hostfile.

    Args:
        overrides: of the run file, or whatever words follow it.
        nproc: ranks a machine. None: every accelerator (of the hostfile: every slot), or one CPU rank.
        port: where rank 0 listens. None: MASTER_PORT, else a free port, or DeepSpeed's default (29500) with a hostfile.
        module: what each rank runs.

    Raises `UserError` without DeepSpeed, for a missing or wrong hostfile, and for more ranks than accelerators.
    """
    port = port or _port_from_environment()
    settings: dict[str, str] = {}
    if hostfile is not None:
        words = ["--hostfile", hostfile]
        if through_pdsh(hosts := list(read_hostfile(hostfile))):
            run, *overrides = map(for_remote_shell, [run, *overrides])
            # Of one host DeepSpeed takes for granted that it is this machine.
            words += ["--force_multi"] if len(hosts) == 1 else []
        words += ["--num_accelerators", str(nproc)] if nproc else []
    elif trains_on_cpu():
        settings = cpu_settings(nproc or 1)
        words = ["--num_accelerators", str(nproc or 1)]
    else:
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        settings, words = choose_devices(nproc, torch.accelerator.device_count(), visible)
    if hostfile is None or port:
        words += ["--master_port", str(port or free_port())]
    options = ["--quiet", "--no_local_rank", "--module", module]
    return Launch([_deepspeed(), *words, *options, run, *overrides], settings)


def ranks_here(nproc: int | None) -> int:
    """Ranks that a run without a hostfile has."""
    if nproc or trains_on_cpu():
        return nproc or 1
    import torch

    return torch.accelerator.device_count()


def through_pdsh(hosts: list[str]) -> bool:
    """Whether ranks on these hosts are started through pdsh and ssh, and not by this machine's own processes."""
    return len(hosts) > 1 or not is_here(hosts[0])


def for_remote_shell(word: str) -> str:
    """Quote a word so that it reaches the shells of the other machines unchanged.

    DeepSpeed's pdsh launcher puts words with a space between double quotes, and escapes double quotes inside them; it
    leaves every other word as it is. pdsh replaces %h, %n and %u in all words, and makes %% a %.
    """
    quoted = re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)
    return quoted.replace("%", "%%")


def choose_devices(nproc: int | None, devices: int, visible: str) -> tuple[dict[str, str], list[str]]:
    """(environment, launcher options) for `nproc` ranks on a machine that shows `devices` accelerators.

    They get the first `nproc` devices of CUDA_VISIBLE_DEVICES (`visible`), or all. DeepSpeed's launcher starts a rank
    on each device that the variable lists, but ignores the variable when it is told a number of ranks.
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
