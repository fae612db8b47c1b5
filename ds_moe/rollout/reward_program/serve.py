"""What a worker does: its limits, and a call of each function for each case."""

import fcntl
import json
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import NoReturn

from ds_moe.rollout.reward_program.code import code_of
from ds_moe.rollout.reward_program.functions import RewardCallable, failure_of, find_function, number_of
from ds_moe.rollout.reward_program.processes import SET_PDEATHSIG, prctl
from ds_moe.rollout.reward_program.protocol import Json, PipeLines, Settings

HIGH_FD = 900  # the worker's pipes are moved up to here, away from what functions close or write to by number
CLOSED = 121  # exit status of a worker that finds its pipe closed


def run_worker(settings: Settings, ask: int, answer: int, printed: int) -> NoReturn:
    """What the forked process does; it never returns."""
    code = 1
    try:
        keeper = os.getppid()
        os.setsid()  # its group is its own: os.killpg(0, ...) in a function leaves the keeper alone
        prctl(SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pipes = _moved_up(ask, answer, printed)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        memory = settings["memory"] if most == resource.RLIM_INFINITY else min(settings["memory"], most)
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")  # where the machine's memory ends, the kernel takes this process before a trainer
        if os.getppid() == keeper:
            _serve(settings, *pipes)
        code = 0
    finally:
        os._exit(code)


def _moved_up(ask: int, answer: int, printed: int) -> tuple[int, int]:
    """Nothing is open but /dev/null to read, the pipe of prints to write, and the two pipes to the keeper, far up."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    high = min(HIGH_FD, most - 8 if most != resource.RLIM_INFINITY else HIGH_FD)
    ask, answer = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, high) for fd in (ask, answer))
    for fd in (1, 2):
        os.dup2(printed, fd)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.closerange(3, min(ask, answer))
    sys.stdin, sys.stdout, sys.stderr = (
        open(0, closefd=False),
        open(1, "w", buffering=1, errors="replace", closefd=False),
        open(2, "w", buffering=1, errors="replace", closefd=False),
    )
    return ask, answer


def _serve(settings: Settings, ask: int, answer: int) -> None:
    pid, before = os.getpid(), set(sys.modules)

    def reply(told: Json) -> None:
        if os.getpid() != pid:  # a function has forked, and this is the child on its way back
            os._exit(0)
        data = json.dumps(told).encode() + b"\n"
        try:
            while data:
                data = data[os.write(answer, data) :]
        except OSError:  # a function has closed what it did not open
            os._exit(CLOSED)

    functions: dict[str, RewardCallable] = {}
    for one in settings["functions"]:
        reply({"turn": 0, "begin": one["name"]})
        try:
            functions[str(one["name"])] = find_function(one)
        except BaseException as error:  # an import may raise anything, SystemExit included
            reply({"turn": 0, **failure_of(error), "kind": "import", "name": one["name"]})
            return
    reply({"turn": 0, "values": {}, "code": code_of(settings["functions"], before)})
    lines = PipeLines(ask)
    while (line := lines.next()) is not None:
        case = json.loads(line)
        turn, values = case["turn"], {}
        try:
            for name, function in functions.items():
                reply({"turn": turn, "begin": name})
                values[name] = number_of(function(case["completion"], case["answer"], case["record"]))
            told = {"turn": turn, "values": values}
        except BaseException as error:  # a function may raise anything, SystemExit included
            told = {"turn": turn, "name": name, **failure_of(error)}
        reply(told)
