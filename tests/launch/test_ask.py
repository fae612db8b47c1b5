"""Ctrl-C and SIGTERM to a job whose ranks were started through pdsh; with real hosts: tests/hosts."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.launch.stand_ins import ROOT, RUN, programs, seen, surroundings
from tests.launcher import HANGS_S, free_port

# Stands in for ds_moe.train: on a SIGTERM it says something, as ranks do, takes a second for a checkpoint and ends.
SAVING_TRAIN = """
import os, pathlib, signal, sys, time
def save(number, frame):
    os.write(1, f"rank {os.environ['RANK']} writes a checkpoint\\n".encode())  # whole: another signal may follow
    time.sleep(1 if os.environ["THEN"] == "save" else 3600)
    pathlib.Path(os.environ["SEEN"], "saved" + os.environ["RANK"]).touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path(os.environ["SEEN"], os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(3600)
"""
# What it starts is no child of its own, and runs on when it has ended: its output is all that ties them together.
# DeepSpeed's own way to end ranks, which a failing test may take, would end those of every other job on this machine.
FAKE_PDSH = """#!/bin/bash
if [[ $* == *pkill* ]]; then exit 1; fi
while [[ $1 == -* ]]; do case $1 in -w) IFS=, read -ra hosts <<<"$2"; shift 2 ;; -f) shift 2 ;; *) shift ;; esac; done
for number in "${!hosts[@]}"; do
    line=${*//%n/$number}
    setsid --fork bash -c "${line//%%/%}; echo \\$? >>$PWD/codes$$" 2>&1 | sed -u "s/^/${hosts[number]}: /" &
done
wait
exit "$(sort -n "codes$$" | tail -n 1)"
"""
FAKE_SSH = "#!/bin/bash\necho 127.0.0.1\n"


@pytest.fixture
def through_pdsh(tmp_path, fake_train):
    """`through_pdsh(command, then)`: the process of a command that starts two hosts of one rank each, once they run."""
    (tmp_path / "ds_moe/train.py").write_text(SAVING_TRAIN)
    (tmp_path / "hosts").write_text("192.0.2.1 slots=1\n192.0.2.2 slots=1\n")
    env = surroundings(fake_train) | programs(tmp_path / "bin", pdsh=FAKE_PDSH, ssh=FAKE_SSH)
    started = []

    def start(command, then):
        words = [
            "env",
            "--default-signal=INT,HUP,TERM",
            *map(str, command),
            "--hostfile",
            "hosts",
            "--port",
            free_port(),
        ]
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen(
                [*map(str, words), RUN], cwd=tmp_path, env=env | {"THEN": then}, stdout=log, stderr=log
            )
        started.append(process)
        deadline = time.monotonic() + HANGS_S
        while len(seen(tmp_path)) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.5)
        return process

    yield start
    for process in [*started, *(int(pid) for pid in seen(tmp_path).values() if pid)]:
        with suppress(ProcessLookupError):
            os.kill(process if isinstance(process, int) else process.pid, signal.SIGKILL)


DS_MOE = (Path(sys.executable).with_name("ds-moe"), "train")
MULTINODE = ("bash", ROOT / "launch/multinode.sh")


def alive(tmp_path):
    return [pid for pid in seen(tmp_path).values() if pid and Path("/proc", pid).exists()]


@pytest.mark.parametrize(
    ("command", "number"),
    [
        (DS_MOE, signal.SIGINT),
        pytest.param(DS_MOE, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(MULTINODE, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(MULTINODE, signal.SIGTERM, marks=pytest.mark.slow),
    ],
    ids=["INT ds-moe", "TERM ds-moe", "INT multinode.sh", "TERM multinode.sh"],
)
def test_ranks_on_other_hosts_write_their_checkpoint(tmp_path, through_pdsh, command, number):
    process = through_pdsh(command, "save")
    process.send_signal(number)
    assert process.wait(HANGS_S) == 128 + number
    output = (tmp_path / "log").read_text()
    assert {"saved0", "saved1"} <= seen(tmp_path).keys(), output
    for rank in range(2):
        assert f"192.0.2.{rank + 1}: rank {rank} writes a checkpoint" in output


@pytest.mark.slow
@pytest.mark.parametrize("command", [DS_MOE, MULTINODE], ids=["ds-moe", "multinode.sh"])
def test_a_second_signal_ends_them_without(tmp_path, through_pdsh, command):
    process = through_pdsh(command, "hang")
    process.send_signal(signal.SIGINT)
    time.sleep(5)
    assert process.poll() is None and len(alive(tmp_path)) == 2
    process.send_signal(signal.SIGINT)
    assert process.wait(HANGS_S) == 130
    deadline = time.monotonic() + HANGS_S
    while alive(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not {"saved0", "saved1"} & seen(tmp_path).keys() and not alive(tmp_path)
