"""Rewards: whatever a function does, it costs its own completion and a line, and never the run."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from ds_moe.config.rollout import BUILT_IN_REWARDS, RewardConfig
from ds_moe.errors import UserError
from ds_moe.rollout import reward_program
from ds_moe.rollout.reward import BUILT_IN, Candidate, RewardPool, Scored, overlong
from ds_moe.rollout.reward_process import own_environment
from ds_moe.rollout.reward_program.processes import below
from ds_moe.rollout.reward_program.protocol import WorkerFailed
from ds_moe.rollout.reward_program.worker import Worker
from tests.launcher import HANGS_S

TIMEOUT_S = 3.0

# name: (what the function does for this completion, the failure that follows; None: the reward is 1)
DEEDS = {
    "hangs": ("time.sleep(1000)", "took longer than 3 s"),
    "waits for a lock": ("lock.acquire(); lock.acquire()", "took longer than 3 s"),
    "stops itself": ("os.kill(os.getpid(), signal.SIGSTOP)", "took longer than 3 s"),
    "ends its process": ("print('so long'); os._exit(7)", "ended its process with status 7; it printed last: so long"),
    "crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV"),
    "kills its group": ("os.killpg(0, signal.SIGKILL)", "died of SIGKILL"),
    "kills its parent": (
        "os.kill(os.getppid(), signal.SIGKILL); time.sleep(9)",
        "its process and that one's keeper were",
    ),
    "prints a flood": ("[print('x' * 999) for _ in range(9999)]", None),
    "forks": ("os.fork() or time.sleep(1000)", None),
    "comes back twice": ("os.fork()", None),
    "returns NaN": ("return float('nan')", "returned nan"),
    "returns None": ("return None", "returned None"),
    "returns a text": ("return '1'", "returned a str, not a number"),
    "returns infinity": ("return 10**400", "returned inf"),
    "returns too much": ("return -1e10", "returned -1e.10, which is beyond 1e.09"),
    "raises": ("raise ValueError('no\\nnumber')", "ValueError: no number .deeds.py:"),
    "raises what cannot be said": ("raise Unspeakable()", "Unspeakable .deeds.py:"),
    "exits": ("sys.exit(0)", "SystemExit: 0 .deeds.py:"),
    "calls itself": ("return score(completion, answer, record)", "RecursionError: maximum recursion depth exceeded"),
    "eats memory": ("bytearray(1 << 31)", "MemoryError .deeds.py:"),
    "closes its streams": ("sys.stdin.close(), sys.stdout.close(), sys.stderr.close(); os.closerange(0, 3)", None),
    "closes everything": ("os.closerange(0, 4096)", "closed the pipe of its answers"),
    "writes into what is open": (
        "[os.write(fd, b'junk\\n') for fd in map(int, os.listdir('/proc/self/fd')) if fd > 2 and writes(fd)]",
        "wrote into the pipe of its answers",
    ),
    "an array's number": ("return numbers(0.25)", 0.25),
    "true": ("return completion == 'true'", 1.0),
}
OPENING = """\
import os, signal, sys, threading, time
lock = threading.Lock()
class Unspeakable(Exception):
    __str__ = None
class numbers:
    def __init__(self, value): self.value = value
    def item(self): return self.value
def writes(fd):
    import fcntl
    try:
        return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
    except OSError:
        return False
"""


@pytest.fixture
def rewards(tmp_path):
    """`rewards(text, **config)` opens a pool whose function is `score` of a file with this text."""
    pools = []

    def made(text, name="my_rewards.py", function="score", longest=100, **config):
        (tmp_path / name).write_text(textwrap.dedent(text))
        notes: list[str] = []
        asked = {"function": f"{tmp_path / name}:{function}", "processes": 1, "timeout_s": TIMEOUT_S, **config}
        pool = RewardPool(RewardConfig(**asked), longest, notes.append, lambda key: "run.yaml:7")
        pools.append(pool)
        return pool, notes

    yield made
    for pool in pools:
        pool.close()


def deeds_file():
    lines = [OPENING.rstrip(), "def score(completion, answer, record):"]
    for name, (deed, _) in DEEDS.items():
        lines += [f"    if completion == {name!r}:", f"        {deed}"]
    return "\n".join([*lines, "    return 1", ""])


def test_whatever_a_function_does_costs_its_completion_alone(rewards):
    pool, notes = rewards(deeds_file(), "deeds.py", processes=3, max_failed=0.9, memory_gb=1.0)
    cases = [one for name in DEEDS for one in (Candidate(name, "", where="prompts.jsonl:3"), Candidate("fine", ""))]
    scored = pool.score(cases)
    assert scored[1::2] == [Scored(1.0, {"score": 1.0})] * len(DEEDS), "the run goes on"
    expected: dict[str, str] = {}  # what is said: the first of each kind
    for (name, (_, outcome)), found in zip(DEEDS.items(), scored[::2], strict=True):
        if isinstance(outcome, str):
            assert found is None, name
            expected.setdefault(outcome, f" (prompts.jsonl:3, completion {name!r}, dropped)")
        else:
            value = 1.0 if outcome is None else outcome
            assert found == Scored(value, {"score": value}), name
    for note, (text, ending) in zip(notes, expected.items(), strict=True):
        assert re.match(f"reward( score)?: {text}", note) and note.endswith(ending) and "\n" not in note, note
    assert pool.scored == len(cases) and sum(pool.failures.values()) == scored.count(None)
    assert len(DEEDS) >= 15


ANSWERS_AND_ENDS = """
    import os, threading
    def score(completion, answer, record):
        if completion == "ends at once":
            print("so long")
            os._exit(7)
        threading.Thread(target=lambda: (ended.wait(0.05), os._exit(7))).start()
        return 1
    ended = threading.Event()
"""


def test_a_slow_keeper_misses_nothing_of_a_worker_that_ends(tmp_path, monkeypatch):
    """What a worker printed and answered counts, also where its keeper finds out late that it has ended."""
    file = tmp_path / "ends.py"
    source = textwrap.dedent(ANSWERS_AND_ENDS)
    one = {"name": "score", "module": "ends", "attribute": "score", "source": source, "file": str(file)}
    settings = {"functions": [one], "timeout_s": TIMEOUT_S, "import_s": 30.0, "memory": 1 << 33}
    reads, _ = os.pipe()

    waitpid = os.waitpid

    def late(*given):
        time.sleep(0.3)
        return waitpid(*given)

    def case(completion):
        return {"completion": completion, "answer": "", "record": {}}

    answers, ends = (Worker(settings, reads) for _ in range(2))
    with monkeypatch.context() as patched:
        patched.setattr(os, "waitpid", late)
        assert answers.call(case("answers")) == {"values": {"score": 1.0}}
        with pytest.raises(WorkerFailed, match="ended its process with status 7; it printed last: so lo"):
            ends.call(case("ends at once"))
    assert answers.is_gone()


def below_this_process() -> set[int]:
    return set(below(os.getpid()))


def gone(processes):
    """Whether all these processes end."""
    deadline = time.monotonic() + HANGS_S
    while any(Path(f"/proc/{one}").exists() for one in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


LEAVES = """
    import os, time
    def score(completion, answer, record):
        if os.fork() == 0:
            os.setsid()  # neither its parent nor its process group tells where it came from
            if os.fork() == 0:
                open(completion, "w").write(str(os.getpid()))
                time.sleep(1000)
            os._exit(0)
        while not (os.path.exists(completion) and open(completion).read()):
            time.sleep(0.01)
        if answer == "hang":
            time.sleep(1000)
        if answer == "die":
            os._exit(1)
        return 1
"""


@pytest.mark.parametrize("end", ["hang", "die", "close"])
def test_what_a_function_leaves_behind_is_killed_with_it(rewards, tmp_path, end):
    pool, _ = rewards(LEAVES, timeout_s=TIMEOUT_S if end == "hang" else HANGS_S)
    left = tmp_path / "pid"
    assert pool.score([Candidate(str(left), end)]) == [Scored(1.0, {"score": 1.0}) if end == "close" else None]
    process = int(left.read_text())
    if end == "close":
        assert Path(f"/proc/{process}").exists()
        pool.close()
    assert gone([process])


TRAINER = """
import os, sys, time
from ds_moe.config.rollout import RewardConfig
from ds_moe.rollout.reward import Candidate, RewardPool

pool = RewardPool(RewardConfig(function=sys.argv[1], processes=2, timeout_s=1000.0), 10)
for number in range(2):
    pool.submit(Candidate(f"{sys.argv[2]}{number}", "hang"))
if os.fork() == 0:  # holds the trainer's ends of all pipes
    time.sleep(3000)
time.sleep(3000)
"""


def test_all_processes_end_when_the_trainer_is_killed(tmp_path):
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(LEAVES))
    words = [sys.executable, "-c", TRAINER, f"{tmp_path}/my_rewards.py:score", f"{tmp_path}/pid"]
    trainer = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": os.getcwd()})
    files = [tmp_path / f"pid{number}" for number in range(2)]

    def all_there():
        children = psutil.Process(trainer.pid).children()  # two keepers, and its own fork
        return len(children) == 3 and all(file.exists() and file.read_text() for file in files)

    deadline = time.monotonic() + HANGS_S
    while not all_there():
        assert trainer.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    processes = below(trainer.pid)
    assert len(processes) >= 7  # its own fork, two keepers, two workers, what two functions left
    holder = next(one for one in processes if b"reward_program" not in Path(f"/proc/{one}/cmdline").read_bytes())
    trainer.kill()
    trainer.wait()
    try:
        assert gone(set(processes) - {holder})
    finally:
        os.kill(holder, signal.SIGKILL)


def test_a_process_knows_nothing_of_the_job(rewards, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT", "SLURM_PROCID", "NCCL_DEBUG", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("MY_OWN", "kept")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        os.set_inheritable(listening.fileno(), True)
        pool, notes = rewards("""
            import os, signal, sys
            def score(completion, answer, record):
                job = {"RANK", "LOCAL_RANK", "MASTER_PORT", "SLURM_PROCID", "NCCL_DEBUG", "TORCHELASTIC_RUN_ID"}
                paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
                open_fds = [os.readlink(path) for path in paths if os.path.exists(path) or os.path.islink(path)]
                found = {
                    "job": sorted(job & set(os.environ)),
                    "sockets": [one for one in open_fds if "socket" in one],
                    "gpu": os.environ["CUDA_VISIBLE_DEVICES"],
                    "own": os.environ["MY_OWN"],
                    "torch": "torch" in sys.modules,
                    "ignored": signal.getsignal(signal.SIGTERM) is signal.SIG_IGN,
                }
                raise ValueError(str(found))
        """)
        assert pool.score([Candidate("", "")]) == [None]
    expected = "{'job': [], 'sockets': [], 'gpu': '', 'own': 'kept', 'torch': False, 'ignored': False}"
    assert notes[0].startswith(f"reward score: ValueError: {expected}")


def test_a_process_runs_the_trainers_own_program_and_finds_what_python_finds(rewards, tmp_path, monkeypatch):
    """Also where this package is on no path, or on one behind another copy of it."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir("/")
    shown_path = [sys.executable, "-c", "import sys; print(sys.path)"]
    expected = subprocess.run(shown_path, env=own_environment(), capture_output=True, text=True).stdout.strip()
    pool, notes = rewards("""
        import sys, ds_moe.rollout.reward_program
        def score(completion, answer, record):
            raise ValueError(f"{ds_moe.rollout.reward_program.__file__}, {sys.path[1:]}")
    """)
    assert pool.score([Candidate("", "")]) == [None]
    own = Path(reward_program.__file__)
    assert f"ValueError: {own}, {expected}"[:300] in notes[0]


def test_several_rewards_their_weights_and_the_penalty_for_length(tmp_path):
    (tmp_path / "both.py").write_text(
        "def short(completion, answer, record):\n    return 1 / len(completion)\n"
        "def asked(completion, answer, record):\n    return record['messages'][0]['content'] == 'why?'\n"
    )
    functions = [
        {"function": "exact", "weight": 2.0},
        {"function": f"{tmp_path}/both.py:short", "name": "brevity", "weight": -0.5},
        {"function": f"{tmp_path}/both.py:asked"},
    ]
    record = {"messages": [{"role": "user", "content": "why?"}]}
    with RewardPool(RewardConfig(functions=functions, overlong_buffer=4, overlong_penalty=3.0), 10) as pool:
        found = pool.score([Candidate("<think>so</think>four", "four", record, tokens) for tokens in (6, 7, 10)])
        lines = pool.lines()
    parts = {"exact": 1.0, "brevity": 1 / 21, "asked": 1.0}
    penalties = [0.0, -0.75, -3.0]
    assert found == [Scored(3 - 0.5 / 21 + cost, {**parts, "overlong": cost}) for cost in penalties]
    assert [line.partition(", sha256")[0] for line in lines] == [
        "reward exact, weight 2",
        f"reward brevity is {tmp_path}/both.py:short, weight -0.5",
        f"reward asked is {tmp_path}/both.py:asked, weight 1",
    ]


@pytest.mark.parametrize(
    "tokens, cost", [(0, 0.0), (100, 0.0), (180, -0.0), (190, -0.5), (199, -0.95), (200, -1.0), (300, -1.0)]
)
def test_the_penalty_is_that_of_dapo(tokens, cost):
    assert overlong(tokens, 200, RewardConfig(overlong_buffer=20)) == pytest.approx(cost)


def test_built_in_rewards_need_no_process():
    before = below_this_process()
    with RewardPool(RewardConfig(functions=[{"function": name} for name in BUILT_IN]), 10) as pool:
        [one, other] = pool.score([Candidate("<think>7 or 9</think> 7 ", "7"), Candidate("it is 7", "7")])
        assert below_this_process() == before
    assert one == Scored(2.0, {"exact": 1.0, "contains": 1.0}) and other == Scored(1.0, {"exact": 0.0, "contains": 1.0})
    assert tuple(BUILT_IN) == BUILT_IN_REWARDS


def test_a_module_by_name_and_a_file_with_a_neighbour(tmp_path, monkeypatch, rewards):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").touch()
    (tmp_path / "mine/rewards.py").write_text("def half(completion, answer, record):\n    return 0.5\n")
    monkeypatch.chdir(tmp_path)
    with RewardPool(RewardConfig(function="mine.rewards:half", processes=1), 10) as pool:
        assert pool.score([Candidate("", "")]) == [Scored(0.5, {"half": 0.5})]
    monkeypatch.chdir("/")
    (tmp_path / "neighbour.py").write_text("value = 0.125\n")
    text = "import neighbour, json\ndef score(completion, answer, record): return neighbour.value\n"
    for name in ("my_rewards.py", "json.py", "ctypes.py"):  # the last two have names of Python's own modules
        (tmp_path / name).write_text(text)
        with RewardPool(RewardConfig(function=f"{tmp_path}/{name}:score", processes=1), 10) as pool:
            assert pool.score([Candidate("", "")]) == [Scored(0.125, {"score": 0.125})]
        (tmp_path / name).unlink()


def test_an_edited_file_does_not_change_the_reward_of_a_run(rewards, tmp_path):
    text = "import os\ndef score(completion, answer, record):\n    return {} if completion else os._exit(1)\n"
    pool, _ = rewards(text.format(1))
    (tmp_path / "my_rewards.py").write_text(text.format(2))
    assert pool.score([Candidate("a", ""), Candidate("", ""), Candidate("a", "")]) == [
        Scored(1.0, {"score": 1.0}),
        None,
    ] + [Scored(1.0, {"score": 1.0})]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """`mine(name, text)` writes a file below a folder in which packages are found."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{tmp_path}/site-packages")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # two edits within a second would be one to Python's cache

    def write(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))

    write("mine/__init__.py", "")
    write("mine/parts.py", "value = 1\n")
    write("mine/rewards.py", "import far\nfrom mine.parts import value\ndef score(*_): return value\n")
    write("site-packages/far.py", "")
    return write


def test_the_digest_is_of_all_that_functions_are_made_of(mine, tmp_path):
    mine("beside/by_file.py", "import neighbour\ndef of_file(*_): return neighbour.value\n")
    mine("beside/neighbour.py", "value = 2\n")
    functions = [{"function": "mine.rewards:score"}, {"function": f"{tmp_path}/beside/by_file.py:of_file"}]

    def digest(functions=functions):
        with RewardPool(RewardConfig(functions=functions, processes=2), 10) as pool:
            assert all(", sha256 " in line for line in pool.lines())
            return pool.digest

    found = [digest()]
    mine("site-packages/far.py", "other = 1\n")  # an installed package, by which no function is named
    assert digest() == found[0]
    edits = {"mine/rewards.py": "from mine.parts import value\ndef score(*_): return value\n"}
    edits |= {"mine/parts.py": "value = 3\n", "beside/neighbour.py": "value = 4\n"}
    for name, text in edits.items():
        mine(name, text)
        found.append(digest())
    assert len(set(found)) == 4
    mine("site-packages/far.py", "def named(*_): return 1\n")
    named = [digest([{"function": "far:named"}])]
    mine("site-packages/far.py", "def named(*_): return 2\n")
    assert digest([{"function": "far:named"}]) != named[0]


@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getppid(), 9) or time.sleep(9)"])
def test_a_module_that_was_edited_gives_no_more_rewards(mine, end):
    """Another process would compute other ones in the same round."""
    score = f"def score(one, *_): return value if one else {end}\n"
    mine("mine/rewards.py", f"import os, time\nfrom mine.parts import value\n{score}")
    notes = []
    with RewardPool(RewardConfig(function="mine.rewards:score", processes=1), 10, notes.append) as pool:
        assert pool.score([Candidate("a", ""), Candidate("", "")]) == [Scored(1.0, {"score": 1.0}), None]
        assert pool.score([Candidate("a", "")]) == [Scored(1.0, {"score": 1.0})]  # another process, of the same code
        mine("mine/parts.py", "value = 2\n")
        assert pool.score([Candidate("a", ""), Candidate("", "")]) == [Scored(1.0, {"score": 1.0}), None]
        assert pool.score([Candidate("a", ""), Candidate("b", "")]) == [None, None]
        text = "reward: mine.parts has changed since the run began: start the run again (completion 'a', dropped)"
        assert notes[1:] == [text]
        mine("mine/parts.py", "value = 1\n")
        assert pool.score([Candidate("a", "")]) == [Scored(1.0, {"score": 1.0})]


def test_a_process_that_ends_between_two_calls_costs_nothing(rewards):
    before = below_this_process()
    pool, notes = rewards("""
        import os, threading
        def score(completion, answer, record):
            threading.Timer(0.2, os._exit, (1,)).start()
            return 1
    """)
    for _ in range(2):
        assert pool.score([Candidate("", "")]) == [Scored(1.0, {"score": 1.0})]
        deadline = time.monotonic() + HANGS_S
        while all(psutil.Process(one).status() != psutil.STATUS_ZOMBIE for one in below_this_process() - before):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert not notes


WRONG = {
    "number = 1\n": "AttributeError: it has no score (it has: no function)",
    "def other(): pass\n": "AttributeError: it has no score (it has: other)",
    "score = 3\n": "TypeError: score is no function",
    "def score(completion): return 1\n": "TypeError: score is called with (completion, answer, record), but too many",
    "async def score(completion, answer, record): return 1\n": "TypeError: score is async; write a plain function",
    "import there_is_no_such_thing\n": "ModuleNotFoundError: No module named 'there_is_no_such_thing' (my_",
    "def score(completion, answer\n": "SyntaxError: '(' was never closed (my_rewards.py, line 1)",
    "import sys\nsys.exit('not today')\n": "SystemExit: not today (my_rewards.py:2)",
    "import os\nprint('oh')\nos._exit(4)\n": "ended its process with status 4; it printed last: oh",
    "raise MemoryError\n": "MemoryError (my_rewards.py:1)",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_function_that_cannot_be_used_is_one_line_before_anything_starts(rewards, tmp_path, text):
    before = below_this_process()
    with pytest.raises(UserError) as raised:
        rewards(text)
    start = f"run.yaml:7: rl.reward.function {tmp_path}/my_rewards.py:score: "
    assert str(raised.value).startswith(start + WRONG[text]) and "\n" not in str(raised.value)
    assert below_this_process() <= before, "nothing is left running"


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "long.py").write_text("#" * (1 << 20) + "\n")
    for name, reason in {
        "gone": "No such file or directory",
        "bytes": "'utf-8' codec can't decode byte 0xff",
        "folder": "Is a directory",
        "long": "larger than 1 MiB",
    }.items():
        with pytest.raises(UserError, match=f"rl.reward.function {tmp_path}/{name}.py:f: cannot read .*: {reason}"):
            RewardPool(RewardConfig(function=f"{tmp_path}/{name}.py:f"), 10)


def test_too_many_failures_end_the_run(rewards):
    pool, notes = rewards("def score(completion, answer, record):\n    return len(completion) or None\n")
    fine, bad = Candidate("a", ""), Candidate("", "")
    assert pool.score([bad] * 15) == [None] * 15, "too few to judge"
    text = r"run.yaml:7: the reward failed for 16 of the last 16 completions \(16 score: returned None\); rl.reward.max"
    with pytest.raises(UserError, match=text):
        pool.score([bad])
    pool.close()
    pool, notes = rewards("def score(completion, answer, record):\n    return len(completion) or None\n")
    assert pool.score([fine, bad] * 200)[-2:] == [Scored(1.0, {"score": 1.0}), None], "half of them may fail"
    assert pool.failure_counts() == "200 score: returned None" and len(notes) == 1
    with pytest.raises(UserError, match="129 of the last 256"):
        pool.score([bad])


def test_a_wait_can_be_ended(rewards):
    pool, notes = rewards("import time\ndef score(*given):\n    time.sleep(3000)\n", timeout_s=3000.0)

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    began, waiting = time.monotonic(), [pool.submit(Candidate("", "")) for _ in range(99)]
    with pytest.raises(Stop):
        pool.collect(waiting, while_waiting=stop)
    pool.close()
    assert pool.collect(waiting) == [None] * 99 and not pool.failures and not notes
    assert time.monotonic() - began < HANGS_S
