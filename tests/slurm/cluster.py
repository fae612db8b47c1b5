"""A private SLURM: a controller and two nodes, each on a host of its own (tests/hosts/network.py)."""

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tests.hosts import network as hosts
from tests.hosts.network import Network, network

NODES = 2
SILENT_S = 20  # after so many seconds without a word from a node, SLURM takes it for down
# How soon a cancelled or ended step is killed, a node missed and a waiting job looked at; the defaults are minutes.
CONF = """
ClusterName=ds_moe_test
SlurmctldHost=switch
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdTimeout={silent}
KillWait=15
MessageTimeout=5
SchedulerParameters=sched_interval=2,batch_sched_delay=1,bf_interval=2
OverTimeLimit=0
GresTypes=gpu
NodeName=node[0-1] CPUs=4 Gres=gpu:2 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def lacking() -> str | None:
    """Why there can be no SLURM here; None if there can."""
    programs = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
    missing = [name for name in programs if shutil.which(name) is None]
    return f"SLURM is not installed: no {', '.join(missing)} (slurm-wlm, munge)" if missing else hosts.lacking()


@dataclass
class Slurm:
    net: Network
    folder: Path

    def command(self, *words: str | Path, node: int = 0, **options) -> str:
        """What a SLURM command prints, run on a node."""
        return self.net.hosts[node].run(*words, env={"SLURM_CONF": str(self.folder / "slurm.conf")}, **options)

    def submit(self, *words: str | Path, cwd: Path, env: dict[str, str]) -> str:
        """`sbatch` from a folder, with more environment variables; the job's id."""
        variables = {"SLURM_CONF": str(self.folder / "slurm.conf"), **env}
        return self.net.hosts[0].run("sbatch", "--parsable", *words, cwd=cwd, env=variables).strip()

    def job(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.command("scontrol", "--oneliner", "show", "job", job)))

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait_for(self, job: str, *states: str, timeout: float) -> str:
        """Wait until a job is in one of some states; AssertionError when it takes too long."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state} after {timeout:.0f} s, not {' or '.join(states)}"
            time.sleep(0.3)
        return state

    def wait_for_nodes(self, timeout: float) -> None:
        """Wait until all nodes are idle."""
        deadline = time.monotonic() + timeout
        states = "no controller yet"
        while states.count("=idle\n") != NODES:
            assert time.monotonic() < deadline, states
            time.sleep(0.3)
            with suppress(AssertionError):  # the controller is starting
                states = self.command("sinfo", "--noheader", "--Node", "--format", "%N=%T")

    def start_node(self, number: int) -> None:
        host = self.net.hosts[number]
        conf = self.folder / "slurm.conf"
        host.start("slurmd", "-D", "-f", conf, log=self.folder / f"slurmd-{number}.out", env={"SLURM_CONF": str(conf)})

    def start_soon(self, job: str) -> None:
        """Start a requeued job 12 seconds after its last process has ended, and not two minutes, which is SLURM's rule.

        No setting shortens them; and what is started again within some seconds, nodes refuse ("credential revoked").
        """
        deadline = time.monotonic() + 600
        while self.state(job) == "PENDING":
            facts = self.job(job)
            assert time.monotonic() < deadline, facts
            with suppress(ValueError):  # "Unknown", as long as processes end
                held_s = (datetime.fromisoformat(facts["StartTime"]) - datetime.now()).total_seconds()
                if 0 < held_s < 120 - 12:
                    self.command("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(1)


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Two idle nodes; all is gone at the end."""
    folder.chmod(0o755)
    (folder / "state").mkdir()
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, silent=SILENT_S))
    (folder / "gres.conf").write_text(f"NodeName=node[0-1] Name=gpu File={folder}/gpu[0-1]\n")
    for number in range(2):  # SLURM counts and deals out what need not be a GPU
        (folder / f"gpu{number}").touch()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    with network(NODES) as net:
        cluster = Slurm(net, folder)
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        socket = folder / "munge.socket"
        net.switch.start("munged", "-F", "--force", *files, f"--socket={socket}", log=folder / "munged.out")
        deadline = time.monotonic() + 600
        while not socket.exists():
            assert time.monotonic() < deadline, (folder / "munged.out").read_text()
            time.sleep(0.1)
        net.switch.start("slurmctld", "-D", "-f", conf, log=folder / "slurmctld.out", env={"SLURM_CONF": str(conf)})
        for number in range(NODES):
            cluster.start_node(number)
        yield cluster
