"""The helper that the distributed tests stand on: it must report, fail loudly, and leave no process behind."""

import time

import pytest

from tests.launcher import HANGS_S, REPORTS, RanksFailed, report, run_ranks, start_ranks

REPORTING = """
import os, sys
from tests.launcher import report
report(rank=int(os.environ["RANK"]), world=int(os.environ["WORLD_SIZE"]), args=sys.argv[1:], first=1)
report(first=2)
print("said by", os.environ["RANK"])
"""
# Rank 1 fails once rank 0 has reported, or the launcher would end rank 0 before it has.
ONE_FAILS = """
import os, pathlib, time
from tests.launcher import REPORTS, report
if os.environ["RANK"] == "0":
    report(got_here=True)
    time.sleep(600)
while not pathlib.Path(os.environ[REPORTS], "rank0.jsonl").exists():
    time.sleep(0.05)
raise ValueError("planted in rank 1")
"""
# A worker in a session of its own, as data loaders may have: killing the process group would miss it.
HANGS = """
import subprocess, time
subprocess.Popen(["sleep", "600"], start_new_session=True)
print("started", flush=True)
time.sleep(600)
"""


@pytest.fixture
def script(tmp_path):
    def write(source):
        path = tmp_path / "rank.py"
        path.write_text(source)
        return path

    return write


def assert_gone(run):
    """No process of the run is left; one that was killed may still take a moment to end."""
    deadline = time.monotonic() + HANGS_S
    while left := list(run.alive()):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@pytest.mark.parametrize("launcher", ["forked", "torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_every_rank_reports(script, launcher):
    run = run_ranks(script(REPORTING), 2, ["two words", "moe.x=$(echo no);1"], launcher=launcher)
    assert [result["rank"] for result in run.json_by_rank] == [0, 1]
    assert run.json["world"] == 2 and run.json["first"] == 2
    assert run.json["args"][-2:] == ["two words", "moe.x=$(echo no);1"]
    assert "said by 1" in run.log(1) and "said by 0" not in run.log(1)


@pytest.mark.parametrize("launcher", ["forked", "torchrun"])
def test_a_failing_rank_fails_the_run_and_is_shown(script, launcher):
    with pytest.raises(RanksFailed, match="planted in rank 1") as failure:
        run_ranks(script(ONE_FAILS), 2, launcher=launcher)
    assert failure.value.run.json == {"got_here": True}
    assert_gone(failure.value.run)


@pytest.mark.parametrize("launcher", ["forked", "torchrun"])
def test_a_hanging_run_is_killed_with_its_workers(script, launcher):
    run = start_ranks(script(HANGS), 2, launcher=launcher)
    run.wait_for("started", rank=1)
    assert sum(process.name() == "sleep" for process in run.alive()) >= 1
    with pytest.raises(RanksFailed, match="not finished after 0 s"):
        run.wait(timeout=0.2)
    assert_gone(run)


def test_one_rank_can_be_killed(script):
    run = start_ranks(script(HANGS), 2)
    run.wait_for("started", rank=1)
    run.kill(rank=1)
    assert run.wait() != 0


def test_report_outside_a_run_prints(capsys, monkeypatch):
    monkeypatch.delenv(REPORTS, raising=False)
    report(loss=0.5)
    assert capsys.readouterr().out == '{"loss": 0.5}\n'
