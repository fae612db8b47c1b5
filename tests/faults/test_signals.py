"""Signals, in processes of their own: what is noted, what ends at once, and when patience is over."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest

from ds_moe.faults.signals import SIGNALS, agreed
from tests.launcher import HANGS_S

TERM, INT, USR1 = SIGNALS


def process(body: str, deadline_s: float = HANGS_S, **more: str) -> subprocess.Popen:
    """A process with a `StopRequest` that has said "ready"; `body` is its main thread's work from there."""
    lines = f"""
    import signal, sys, time
    from ds_moe.faults.signals import StopRequest, agreed, leave_to_parent
    stop = StopRequest(3, {deadline_s}, lambda: "step 7, forward", **{more})
    """
    code = textwrap.dedent(lines) + textwrap.dedent(body)
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stdout is not None and started.stdout.readline() == "ready\n"
    return started


STEP = """
stop.wait_for_step()
print("ready", flush=True)
while stop.received is None:
    time.sleep(0.01)
print(stop.received.name, stop.votes())
"""
HANGS = """
stop.wait_for_step()
print("ready", flush=True)
from threading import Lock
lock = Lock()
lock.acquire()
lock.acquire()  # as in a collective: no handler of Python's runs
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_left_to_the_step(number):
    running = process(STEP)
    running.send_signal(number)
    out, error = running.communicate(timeout=HANGS_S)
    votes = [float(one == number) for one in SIGNALS]
    assert (running.returncode, out) == (0, f"{number.name} {votes}\n")
    assert error == f"rank 3: received {number.name} in step 7, forward: a checkpoint follows at the step's end\n"


def test_before_the_first_step_a_signal_ends_at_once():
    running = process('print("ready", flush=True); time.sleep(600)')
    running.send_signal(TERM)
    _, error = running.communicate(timeout=HANGS_S)
    assert running.returncode == 128 + TERM
    assert error == "rank 3: received SIGTERM before the first step: ending\n"


def test_what_saves_nothing_ends_at_once_and_says_so():
    running = process('print("ready", flush=True); time.sleep(600)', at_once="in an evaluation")
    running.send_signal(INT)
    _, error = running.communicate(timeout=HANGS_S)
    assert running.returncode == 128 + INT
    assert error == "rank 3: received SIGINT in an evaluation: ending\n"


def test_what_ends_at_once_leaves_no_files_of_no_use(tmp_path):
    partial, scratch = tmp_path / "a.partial", tmp_path / "scratch"
    partial.write_text("half")
    (scratch / "cache").mkdir(parents=True)
    paths = list(map(str, (tmp_path / "missing", partial, scratch)))
    body = f"""
    from pathlib import Path
    stop.leftovers += map(Path, {paths})
    print("ready", flush=True)
    time.sleep(600)
    """
    running = process(body)
    running.send_signal(TERM)
    assert "ending" in running.communicate(timeout=HANGS_S)[1]
    assert running.returncode == 128 + TERM and not list(tmp_path.iterdir())


def test_a_step_that_takes_longer_than_the_deadline_ends_without_a_checkpoint():
    running = process(HANGS, deadline_s=0.5)
    began = time.monotonic()
    running.send_signal(USR1)
    _, error = running.communicate(timeout=HANGS_S)
    assert running.returncode == 128 + USR1 and time.monotonic() - began > 0.5
    assert "still in step 7, forward 0.5 s (train.stop_within_s) after SIGUSR1" in error


def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not():
    running = process(HANGS)
    for number in (INT, TERM, TERM):
        running.send_signal(number)
        time.sleep(0.2)
    assert running.poll() is None
    running.send_signal(INT)
    _, error = running.communicate(timeout=HANGS_S)
    assert running.returncode == 128 + INT
    assert error.endswith("rank 3: received SIGINT again: ending without a checkpoint\n")


def test_close_gives_the_handlers_back():
    running = process('stop.wait_for_step(); stop.close(); print("ready", flush=True); time.sleep(600)')
    running.send_signal(TERM)
    assert running.wait(timeout=HANGS_S) == -TERM


def test_a_data_worker_leaves_signals_to_its_rank():
    running = process('stop.close(); leave_to_parent(); print("ready", flush=True); time.sleep(1)')
    for number in SIGNALS:
        running.send_signal(number)
    assert running.wait(timeout=HANGS_S) == 0


@pytest.mark.parametrize(
    ("votes", "expected"),
    [([0, 0, 0], None), ([0, 0, 2], signal.SIGUSR1), ([1, 0, 1], signal.SIGTERM), ([0, 1, 5], signal.SIGINT)],
)
def test_all_ranks_obey_the_same_signal(votes, expected):
    assert agreed([float(vote) for vote in votes]) is expected
