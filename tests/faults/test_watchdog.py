"""The watchdog's verdicts, on a store of one process and a clock that the test sets."""

import json
import re
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch.distributed as dist

from ds_moe.faults.watchdog import SILENCE, STALLED, Heard, Place, Watchdog
from tests.launcher import HANGS_S

LIMIT_S = 100.0
NOW = 10_000.0


@pytest.fixture
def watch():
    """Rank 0's watchdog of three ranks, all at turn 5 and heard of a moment ago."""
    dog = Watchdog(Mock(), 0, 3, LIMIT_S, end=Mock())
    dog._answered = NOW
    dog.place = Place(5, 12, "forward", NOW - 1, timed=True)
    dog._heard = [heard(rank, turn=5) for rank in range(3)]
    return dog


def heard(rank, turn, at=NOW - 1, since=NOW - 1, place="step 12, forward", done=False):
    news = {"turn": turn, "place": place, "host": f"node-{rank}, pid 4{rank}", "done": done}
    return Heard(at, since, json.dumps(news).encode(), news)


def test_all_is_well(watch):
    assert watch.verdict(NOW) == []


def test_a_rank_that_gives_no_sign_of_life_is_named_with_its_last_place(watch):
    watch._heard[2] = heard(2, turn=4, at=NOW - SILENCE * LIMIT_S - 1, place="step 12, data")
    silent, own = watch.verdict(NOW)
    assert silent == "rank 2 has not been heard of for 76 s (node-2, pid 42), last in step 12, data"
    assert own == "rank 0 (this one) has been in step 12, forward for 1 s"


def test_a_rank_that_has_ended_well_may_be_silent(watch):
    watch._heard[2] = heard(2, turn=9, at=NOW - 10 * LIMIT_S, done=True)
    assert watch.verdict(NOW) == []


def test_no_progress_names_the_ranks_that_are_behind(watch):
    watch.place = Place(6, 12, "sums over ranks", NOW - LIMIT_S - 1, timed=True)
    watch._heard = [heard(0, 6, since=0), heard(1, 4, since=0, place="step 12, data"), heard(2, 6, since=0)]
    limit, behind, own = watch.verdict(NOW)
    assert limit == "no progress for 100 s (train.watchdog_s)"
    assert behind == "rank 1 is behind the others (node-1, pid 41), last in step 12, data"
    assert own == "rank 0 (this one) has been in step 12, sums over ranks for 101 s"


def test_a_collective_that_nobody_ends_is_said_to_be_one(watch):
    watch.place = Place(5, 12, "forward", NOW - LIMIT_S - 1, timed=True)
    watch._heard = [heard(rank, 5, since=NOW - LIMIT_S - 1) for rank in range(3)]
    assert "all 3 ranks are in step 12, forward" in watch.verdict(NOW)


def test_waiting_for_a_rank_that_moves_is_no_standstill(watch):
    """Rank 1 still writes a large file."""
    watch.place = Place(6, 12, "checkpoint's files", NOW - 5 * LIMIT_S, timed=True)
    watch._heard = [heard(0, 6, since=0), heard(1, 5, since=NOW - 3), heard(2, 6, since=0)]
    assert watch.verdict(NOW) == []
    watch._heard[1] = heard(1, 5, since=NOW - LIMIT_S - 1)
    assert watch.verdict(NOW)


def test_what_is_not_timed_may_take_long(watch):
    watch.place = Place(5, 0, "start", NOW - 9 * LIMIT_S, timed=False)
    assert watch.verdict(NOW) == []


def test_a_store_that_does_not_answer_names_the_host_of_rank_0(watch):
    watch._answered = NOW - SILENCE * LIMIT_S - 1
    [line, _] = watch.verdict(NOW)
    assert line.startswith("the job's store has not answered for 76 s: the host of rank 0 (node-0, pid 40)")


def test_turns_count_up_and_a_pulse_does_not():
    dog = Watchdog(Mock(), 0, 1, LIMIT_S)
    dog.at("data", step=3)
    dog.at("forward")
    turn, since = dog.place.turn, dog.place.since
    time.sleep(0.01)
    dog.pulse()
    assert (dog.place.turn, dog.place.step, str(dog.place)) == (turn, 3, "step 3, forward") and dog.place.since > since


ALONE = """
import sys, threading, time
import torch.distributed as dist
from ds_moe.faults.watchdog import watch_job

dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", 0, 1, True), rank=0, world_size=1)
limit_s = float(sys.argv[2])
watch = watch_job(0, 1, limit_s)
watch.at("data", step=4)
if sys.argv[1] == "moves":
    began = time.monotonic()
    while time.monotonic() < began + 1.2 * limit_s:
        time.sleep(0.1)
        watch.at("data")
    watch.close(complete=True)
    time.sleep(1.2 * limit_s)
    sys.exit(0)

def innermost():
    time.sleep(600)

def of_autograd():  # where a backward pass on a GPU runs
    time.sleep(600)

threading.Thread(target=of_autograd, daemon=True).start()
innermost()
"""


# What moves must not be ended by a busy machine's pauses: its limit is the longer one.
@pytest.mark.parametrize(
    ("way", "limit_s", "code"), [pytest.param("moves", 4, 0, marks=pytest.mark.slow), ("stands", 1, STALLED)]
)
def test_a_process_that_stands_still_is_ended_with_the_stacks_of_its_threads(way, limit_s, code):
    assert dist.is_available()
    ended = subprocess.run(
        [sys.executable, "-c", ALONE, way, str(limit_s)], capture_output=True, text=True, timeout=HANGS_S
    )
    assert ended.returncode == code, ended.stderr
    assert ("watchdog: no progress for 1 s" in ended.stderr) == bool(code)
    assert ("in innermost" in ended.stderr) == ("in of_autograd" in ended.stderr) == bool(code)
    if code:  # the training thread is told from the others
        training = re.search(r"training is (0x\w+):", ended.stderr).group(1)
        assert "in innermost" in ended.stderr.split(f"hread {training} ")[1].split("hread 0x")[0]
