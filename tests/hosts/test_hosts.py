"""launch/multinode.sh between separate hosts: the same numbers as on one, and an end everywhere when one is cut off."""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.distributed.test_resume import LAST, RUN, bit_equal, checkpoints, position, tensors
from tests.hosts import network as hosts
from tests.hosts.network import Host, Network, network
from tests.launcher import HANGS_S, ROOT, run_ranks

LACKING = hosts.lacking()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(LACKING is not None, reason=str(LACKING))]
ENV = {"VIRTUAL_ENV": sys.prefix, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
START_S = 600  # for the ranks' imports on a busy machine


class Job:
    """The same line of launch/multinode.sh started on every host; what it writes is in `folder`."""

    def __init__(self, net: Network, folder: Path, overrides: Sequence[str]):
        self.net, self.folder = net, folder
        words = [
            "bash",
            "launch/multinode.sh",
            "--nodes",
            len(net.hosts),
            "--gpus",
            1,
            "--master",
            net.hosts[0].address,
        ]
        words += [RUN, f"train.output_dir={folder}/run", *overrides]
        self.launchers: list[subprocess.Popen] = [
            host.start(*words, log=folder / host.name, cwd=ROOT, env=ENV) for host in net.hosts
        ]

    def output(self, number: int) -> str:
        return (self.folder / f"node{number}").read_text()

    @property
    def outputs(self) -> str:
        return "\n".join(f"--- node{number}\n{self.output(number)[-4000:]}" for number in range(len(self.launchers)))

    def wait_for_text(self, pattern: str, timeout: float, number: int = 0) -> None:
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.output(number)):
            running = all(launcher.poll() is None for launcher in self.launchers)
            assert running and time.monotonic() < deadline, f"no {pattern!r}\n{self.outputs}"
            time.sleep(0.1)

    def wait(self, timeout: float) -> list[float]:
        """Seconds until each launcher has ended."""
        began, ended = time.monotonic(), [0.0] * len(self.launchers)
        while not all(ended):
            assert time.monotonic() - began < timeout, f"after {timeout:.0f} s: {ended}\n{self.outputs}"
            for number, launcher in enumerate(self.launchers):
                if not ended[number] and launcher.poll() is not None:
                    ended[number] = time.monotonic() - began
            time.sleep(0.1)
        return ended

    @property
    def codes(self) -> list[int | None]:
        return [launcher.poll() for launcher in self.launchers]


@pytest.mark.parametrize("count", [2, 4])
def test_several_hosts_equal_one_bit_for_bit(tmp_path, count):
    """4 hosts, EP 2: the expert-parallel groups are hosts 0 and 1, and 2 and 3."""
    overrides = ["train.micro_batch_size=2"]
    with network(count) as net:
        job = Job(net, tmp_path, overrides)
        job.wait(START_S)
        assert job.codes == [0] * count, job.outputs
    run_ranks("ds_moe.train", count, [RUN, f"train.output_dir={tmp_path}/one", *overrides])
    ours, theirs = (checkpoints(tmp_path / name) / LAST for name in ("run", "one"))
    assert bit_equal(tensors(ours), tensors(theirs))
    assert position(ours) == position(theirs)


WATCHDOG_S = 20


@pytest.mark.parametrize("cut", [0, 1], ids=["the master", "another host"])
def test_a_host_cut_off_ends_the_job_on_both_sides_by_name(tmp_path, show, cut):
    with network(2) as net:
        job = Job(net, tmp_path, [f"train.watchdog_s={WATCHDOG_S}", "train.steps=2000", "checkpoint.every=1000"])
        job.wait_for_text("step +5/2000", START_S)
        net.unplug(cut)
        seconds = job.wait(START_S)
        assert all(code not in (0, None) for code in job.codes), job.outputs
        for number in range(2):
            other = 1 - number
            assert f"(node{other}" in job.output(number) and "watchdog: " in job.output(number), job.outputs
            assert not net.hosts[number].processes("ds_moe.train")
    show(f"node{cut} cut off, watchdog_s={WATCHDOG_S}: launchers ended after {seconds[0]:.0f} s and {seconds[1]:.0f} s")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Launchers heed SIGINT also where the tests run in a shell's background, which makes every program ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_on_one_host_ends_the_job_on_all_with_a_checkpoint(tmp_path, number):
    """To the whole process group, as a terminal does; USR1 to the rank."""
    with network(2) as net:
        job = Job(net, tmp_path, ["train.steps=2000", "checkpoint.every=1000"])
        job.wait_for_text("step +5/2000", START_S)
        program = "ds_moe.train" if number == signal.SIGUSR1 else "launch/multinode.sh"
        for process in net.hosts[1].processes(program):
            process.send_signal(number)
        job.wait(START_S)
        assert all(code not in (0, None) for code in job.codes), job.outputs
        if number != signal.SIGUSR1:
            assert job.codes[1] == 128 + number
    assert len(list(checkpoints(tmp_path / "run").glob("step_*"))) == 1, job.outputs


SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
"""
SSH = """
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


def start_ssh(net: Network, folder: Path) -> None:
    """sshd on every host, and root's way from each to each with a key of this test."""
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    for host in net.hosts:
        host.run("mount", "--bind", folder / "ssh_config", "/etc/ssh/ssh_config")
        host.run("mount", "-t", "tmpfs", "run", "/run")
        host.run("mkdir", "/run/sshd")
        host.start(shutil.which("sshd"), "-D", "-e", "-f", folder / "sshd_config", log=folder / f"sshd-{host.name}")


NEEDS_SSH = pytest.mark.skipif(not all(map(shutil.which, ("sshd", "ssh", "pdsh"))), reason="needs sshd, ssh and pdsh")


@NEEDS_SSH
def test_hostfile_through_pdsh_and_ssh_equals_one_host_bit_for_bit(tmp_path):
    """The words have what pdsh would replace, or read beyond the end of."""
    (tmp_path / "hosts").write_text("  # rack 1\r\nnode0 slots=1 # %h\r\nnode1 slots=1\r\n")
    words = ["bash", "launch/multinode.sh", "--hostfile", tmp_path / "hosts", RUN]
    with network(2) as net:
        start_ssh(net, tmp_path)
        net.hosts[0].run(*words, f"train.output_dir={tmp_path}/%h_100%", cwd=ROOT, env=ENV, timeout=HANGS_S)
    run_ranks("ds_moe.train", 2, [RUN, f"train.output_dir={tmp_path}/one"])
    ours, theirs = (checkpoints(tmp_path / name) / LAST for name in ("%h_100%", "one"))
    assert bit_equal(tensors(ours), tensors(theirs))


@contextmanager
def through_pdsh(folder: Path, program: str, *overrides: str) -> Iterator[tuple[Network, subprocess.Popen]]:
    """Two hosts and the command on the first that trains on both through pdsh and ssh, in its fifth step."""
    (folder / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    # DeepSpeed hands no other variables on. Of a host's addresses ds-moe takes the first, so there must be one only.
    (folder / "env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=eth0\n")
    words = {"ds-moe": [Path(sys.executable).with_name("ds-moe"), "train"]}.get(program, ["bash", program])
    words += ["--hostfile", folder / "hosts", RUN, f"train.output_dir={folder}/run", "checkpoint.every=1000"]
    with network(2) as net:
        start_ssh(net, folder)
        for host in net.hosts:
            host.run("ip", "link", "delete", "docker0")
        env = ENV | {"DS_ENV_FILE": str(folder / "env")}
        log = folder / "log"
        process = net.hosts[0].start(*words, "train.steps=2000", *overrides, log=log, cwd=ROOT, env=env)
        deadline = time.monotonic() + HANGS_S
        while not re.search("step +5/2000", log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.1)
        yield net, process


@NEEDS_SSH
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("program", ["ds-moe", "launch/multinode.sh"])
def test_a_signal_through_pdsh_ends_the_job_on_all_hosts_with_a_checkpoint(tmp_path, program, number):
    with through_pdsh(tmp_path, program) as (net, process):
        for one in net.hosts[0].processes(program):
            one.send_signal(number)
        code, output = process.wait(HANGS_S), (tmp_path / "log").read_text()
        assert code == 128 + number and not [host for host in net.hosts if host.processes("ds_moe.train")], output
    for rank in range(2):
        assert f"node{rank}: rank {rank}: received SIGTERM in step" in output
    assert len(list(checkpoints(tmp_path / "run").glob("step_*"))) == 1, output


def ranks_of(host: Host) -> list[psutil.Process]:
    """Not those that start them, whose command lines hold the rank's."""
    return [one for one in host.processes("ds_moe.train") if one.cmdline()[1:4] == ["-u", "-m", "ds_moe.train"]]


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + HANGS_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@NEEDS_SSH
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("program", ["ds-moe", "launch/multinode.sh"])
def test_a_second_signal_through_pdsh_leaves_nothing_of_the_job_and_all_of_others(tmp_path, program):
    """A job whose ranks are stuck, and another one of the same user on the same host."""
    other = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--world_info=eyJub2RlMSI6IFswXX0="]
    other += ["--no_python", "--no_local_rank", "sleep", "infinity"]
    with through_pdsh(tmp_path, program) as (net, process):
        net.hosts[1].start(*other, log=tmp_path / "other", cwd=ROOT, env=ENV)
        wait_until(lambda: net.hosts[1].processes("infinity"))
        ranks = [rank for host in net.hosts for rank in ranks_of(host)]
        assert len(ranks) == 2
        for rank in ranks:
            rank.suspend()
        for _ in range(2):
            for one in net.hosts[0].processes(program):
                one.send_signal(signal.SIGINT)
            time.sleep(15)
        assert process.wait(HANGS_S) == 130
        wait_until(lambda: not any(host.processes("ds_moe.train") for host in net.hosts))
        assert net.hosts[1].processes("infinity")
