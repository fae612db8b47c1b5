"""Separate hosts on one machine: namespaces with an address, a name and processes of their own, joined by a switch.

Every host has what trips a launcher up on real ones: it takes its own name for 127.0.1.1, as Debian's installer writes
it, and has a second interface, before the real one, whose address is the same everywhere (Docker's bridge). The file
system is shared, but for /dev/shm and /etc/hosts. Nothing outside the namespaces is changed, and when this process
ends, however it does, the hosts go with all that runs on them.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SWITCH = "switch"
DOCKER = "172.17.0.1"  # of every host
UNSHARE = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL")


def lacking() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    programs = [name for name in ("unshare", "nsenter", "ip", "ping", "hostname") if shutil.which(name) is None]
    if programs:
        return f"needs {', '.join(programs)} (util-linux, iproute2, iputils-ping, hostname)"
    result = subprocess.run([*UNSHARE, "ip", "link", "add", "type", "veth"], capture_output=True, text=True)
    return f"no namespaces here: {result.stderr.strip()}" if result.returncode else None


@dataclass
class Host:
    """One host. Its process 1 ends, and with it all others, when `power` (its standard input) is closed."""

    name: str
    address: str
    power: subprocess.Popen
    init: int  # process 1, as seen from outside
    started: list[subprocess.Popen] = field(default_factory=list)

    def inside(self, cwd: Path, *words: str | Path) -> list[str]:
        """The command line that runs a command on this host, in a folder."""
        enter = ["nsenter", "--target", str(self.init), "--net", "--uts", "--mount", "--pid"]
        return [*enter, "--", "env", f"--chdir={cwd}", *map(str, words)]

    def run(
        self,
        *words: str | Path,
        cwd: Path = Path("/"),
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> str:
        """What a command prints here; AssertionError with all it wrote if it fails."""
        result = subprocess.run(
            self.inside(cwd, *words), env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout
        )
        assert result.returncode == 0, f"{self.name}: {' '.join(map(str, words))}\n{result.stdout}{result.stderr}"
        return result.stdout

    def start(
        self, *words: str | Path, log: Path, cwd: Path = Path("/"), env: Mapping[str, str] | None = None
    ) -> subprocess.Popen:
        """Start a command here; what it writes goes to the file `log`."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                self.inside(cwd, *words),
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def processes(self, word: str) -> list[psutil.Process]:
        """Living processes of this host whose command line has an argument that ends in `word`."""
        here = os.stat(f"/proc/{self.init}/ns/pid")
        found = []
        for process in psutil.process_iter():
            try:
                same = os.path.samestat(os.stat(f"/proc/{process.pid}/ns/pid"), here)
                if same and any(part.endswith(word) for part in process.cmdline()):
                    found.append(process)
            except (OSError, psutil.Error):
                continue
        return found

    def power_off(self) -> None:
        """Everything on this host ends at once."""
        self.power.stdin.close()
        self.power.wait()
        for process in self.started:
            process.wait()


def boot(name: str, address: str) -> Host:
    # bash, as process 1, collects the orphans that others leave behind.
    words = ["bash", "-c", 'mount -t tmpfs shm /dev/shm; hostname "$0"; echo up; read -r _', name]
    power = subprocess.Popen([*UNSHARE, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert power.stdout.readline() == "up\n"
    [init] = psutil.Process(power.pid).children()
    host = Host(name, address, power, init.pid)
    host.run("ip", "link", "set", "lo", "up")
    return host


@dataclass
class Network:
    """Hosts node0, node1, ... at 10.77.0.1, 10.77.0.2, ..., and the switch between them, a host itself."""

    switch: Host
    hosts: list[Host]
    folder: Path

    def names(self, host: Host) -> None:
        """Names of all hosts, without a name server (looking for one takes seconds)."""
        others = [f"10.77.0.{number + 1} node{number}" for number in range(len(self.hosts))]
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {host.name}", "10.77.0.254 switch", *others]
        table = self.folder / f"hosts-{host.name}"
        table.write_text("\n".join(line for line in lines if line.split()[1] != host.name or line[:3] == "127"))
        host.run("mount", "--bind", table, "/etc/hosts")
        host.run("mount", "--bind", "/dev/null", "/etc/resolv.conf")

    def add(self, number: int) -> Host:
        """Boot host `number` (again) and plug it in."""
        host = boot(f"node{number}", f"10.77.0.{number + 1}")
        self.names(host)
        host.run("ip", "link", "add", "docker0", "type", "bridge")
        host.run("ip", "address", "add", f"{DOCKER}/16", "dev", "docker0")
        host.run("ip", "link", "set", "docker0", "up")
        # Of the switch, only the network is entered: the host's process id is as seen from outside.
        veth = ["ip", "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", str(host.init)]
        subprocess.run(["nsenter", f"--net=/proc/{self.switch.init}/ns/net", *veth], check=True)
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        self.switch.run("ip", "link", "set", f"port{number}", "master", "br0", "up")
        host.run("ping", "-q", "-c", "1", "-w", "10", "switch")  # the first packets may be lost
        return host

    def unplug(self, number: int) -> None:
        """Cut the cable of a host: nothing reaches it any more, and it reaches nobody."""
        self.switch.run("ip", "link", "set", f"port{number}", "down")

    def plug(self, number: int) -> None:
        self.switch.run("ip", "link", "set", f"port{number}", "up")


@contextmanager
def network(hosts: int) -> Iterator[Network]:
    """`hosts` hosts; all is gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="hosts-"))
    switch = boot(SWITCH, "10.77.0.254")
    net = Network(switch, [None] * hosts, folder)
    try:
        net.names(switch)
        switch.run("ip", "link", "add", "br0", "type", "bridge")
        switch.run("ip", "address", "add", f"{switch.address}/24", "dev", "br0")
        switch.run("ip", "link", "set", "br0", "up")
        for number in range(hosts):
            net.hosts[number] = net.add(number)
        yield net
    finally:
        for host in [*filter(None, net.hosts), switch]:
            host.power_off()
        shutil.rmtree(folder)
