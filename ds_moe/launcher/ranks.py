"""Signals to the ranks that a launcher has started: those of this host, and through pdsh those of others.

`python -m ds_moe.launcher.ranks NUMBER PID` sends signal NUMBER to the ranks of the launcher with process id PID.
"""

import base64
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress

import psutil  # DeepSpeed depends on it

SSH_S = 30  # seconds that other hosts have to signal their ranks
MOST_HOSTS = 1024  # at a time, as DeepSpeed has it
# What starts a host's ranks under DeepSpeed's launcher, and its words that tell one job from another on the same host.
ON_HOST = "deepspeed.launcher.launch"
JOB = ("--world_info=", "--master_addr=", "--master_port=")


def ask_ranks(launcher: int, number: int = signal.SIGTERM) -> int:
    """Send a signal to the ranks that a launcher of this host has started, on whatever host; return their number."""
    below = _below(launcher)
    return _signal_ranks(below, number) + sum(_signal_hosts(pdsh, number) for pdsh in filter(_is_pdsh, below))


def kill_elsewhere(launcher: int) -> bool:
    """Kill what a launcher of this host has started on others; False if it starts ranks on this host only.

    DeepSpeed's own way would end every job that the user has on those hosts.
    """
    hosts = list(filter(_is_pdsh, _below(launcher)))
    for pdsh in hosts:
        _signal_hosts(pdsh, signal.SIGKILL)
    return bool(hosts)


def _below(launcher: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(launcher).children(recursive=True)
    return []


def _is_pdsh(process: psutil.Process) -> bool:
    """Whether a process is the pdsh of DeepSpeed's launcher."""
    with suppress(psutil.Error):
        return process.name().startswith("pdsh") and ON_HOST in process.cmdline()  # Debian's is named pdsh.bin
    return False


def _signal_ranks(processes: Iterable[psutil.Process], number: int) -> int:
    asked = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "RANK" in process.environ():
                process.send_signal(number)
                asked += 1
    return asked


def _signal_hosts(pdsh: psutil.Process, number: int) -> int:
    """Send a signal to the ranks on the hosts of a pdsh, the way it reaches them; return their number.

    That pdsh itself goes on: ranks whose output nobody reads any more write no checkpoint.
    """
    try:
        words, environment, folder = pdsh.cmdline(), pdsh.environ(), pdsh.cwd()
    except psutil.Error:  # it has ended, and they with it
        return 0
    path = os.pathsep.join(filter(None, (folder, environment.get("PYTHONPATH"))))
    job = [word for word in words if word.startswith(JOB)]
    # Its -w does not tell the hosts: pdsh cuts that word into pieces where it stands.
    world_info = next(word for word in job if word.startswith(JOB[0])).removeprefix(JOB[0])
    hosts = ",".join(json.loads(base64.urlsafe_b64decode(world_info)))
    there = ["env", f"PYTHONPATH={path}", sys.executable, "-m", "ds_moe.launcher.ranks", str(number), *job]
    remote = f"cd {shlex.quote(folder)} && {shlex.join(there)}".replace("%", "%%")  # pdsh replaces %h, %n and %u
    environment["PDSH_SSH_ARGS_APPEND"] = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} -o ConnectTimeout=10"
    try:
        result = subprocess.run(
            ["pdsh", "-S", "-f", str(MOST_HOSTS), "-w", hosts, remote],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=SSH_S,
            start_new_session=True,  # a second Ctrl-C is not for it
        )
    except subprocess.TimeoutExpired:
        print(f"ds-moe: not all of {hosts} have answered within {SSH_S} s", file=sys.stderr)
        return 1  # some may have
    answers = (line.rsplit(":", 1)[-1].strip() for line in result.stdout.splitlines())  # "host: number"
    return sum(int(answer) for answer in answers if answer.isdecimal())


def signal_job(number: int, job: list[str]) -> int:
    """Send a signal to this host's ranks of a job that some host has started through pdsh; return their number.

    Their launcher gets none, since it would leave them half a minute, but for a SIGKILL: it might be starting more.
    """
    asked = 0
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            words = process.cmdline()
            if words[1:4] == ["-u", "-m", ON_HOST] and set(job) <= set(words):
                ranks = process.children(recursive=True)
                if number == signal.SIGKILL:
                    process.kill()
                asked += _signal_ranks(ranks, number)
    return asked


if __name__ == "__main__":
    number, *words = sys.argv[1:]
    print(ask_ranks(int(words[0]), int(number)) if words[0].isdecimal() else signal_job(int(number), words))
