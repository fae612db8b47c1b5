"""The program in which reward functions of a user are called, apart from the trainer. Standard library only.

Two processes: a keeper, which runs none of the user's code, and its worker, which does. The trainer starts the keeper
and writes it a line of JSON for each completion; the keeper hands it on, waits no longer than the limit, and answers
with one line. Whatever a function does (hang, crash, fork, print without end, close what is open), the keeper kills
the worker with all that came of it, and starts another. When the trainer is gone, the keeper ends in the same way.

    trainer -> keeper   {"functions": [...], "timeout_s": ..., "import_s": ..., "memory": bytes, "code": ...}  once
                        {"completion": text, "answer": text, "record": object}                    for each call
    keeper -> trainer   {"values": {name: number}} or {"kind": ..., "error": ..., "name": ...}    for both
                        with "code", see `code_of`, once
"""

import fcntl
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import resource
import select
import signal
import sys
import sysconfig
import time
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, NotRequired, TypedDict

ENDS_A_WORKER = ("import", "MemoryError")  # failures after which a worker that answers is of no use
LARGEST = 1e9  # of a reward, of either sign, as rollout files have it
LINE = 1 << 22  # bytes of one answer of the worker
TAIL = 2000  # bytes of what a worker printed last
WAKES_S = 0.05  # between two looks at whether the worker is alive
LOOKS_UP_S = 2.0  # between two looks at whether the trainer is alive
MOST_BELOW = 256  # processes that functions may leave running
KILLED_S = 10.0  # for killed processes to be gone
HIGH_FD = 900  # the worker's pipes are moved up to here, away from what functions close or write to by number
CLOSED = 121  # exit status of a worker that finds its pipe closed
SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
INSTALLED = ("site-packages", "dist-packages")  # folders of packages that are not the user's own
STDLIB = sysconfig.get_paths()["stdlib"] + os.sep

Json = dict[str, object]


class Settings(TypedDict):
    """What the trainer says first. A function is as `find_function` reads it, with its "name"."""

    functions: list[Json]
    timeout_s: float  # of a call of one function
    import_s: float  # of the import of one
    memory: int  # bytes of data of the worker
    code: NotRequired[dict[str, str] | None]  # of an earlier worker, see `code_of`


class WorkerFailed(Exception):
    """What the keeper answers in place of values: `kind` tells failures apart, `error` is for a person."""

    def __init__(self, kind: str, error: str, name: str = "") -> None:
        super().__init__(error)
        self.answer: Json = {"kind": kind, "error": error, "name": name}


# --- the keeper


def keep(requests: int, answers: int) -> None:
    """Answer the trainer's lines until it closes `requests`."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # launchers signal every process; the trainer decides when this one ends
    _prctl(SET_CHILD_SUBREAPER, 1)  # orphans of the worker become the keeper's children, wherever they went
    lines, trainer = PipeLines(requests), os.getppid()
    settings: Settings | None = None
    worker: Worker | None = None
    try:
        while True:
            case = json.loads(_from_trainer(lines, trainer))
            first, settings = settings is None, settings or case
            try:
                if worker is not None and worker.is_gone():  # it ended between two calls: no completion's fault
                    worker = None
                    kill_children()
                if worker is None:
                    worker = Worker(settings, requests)
                answer = {"values": {}, "code": worker.code} if first else worker.call(case)
            except WorkerFailed as failed:
                answer = failed.answer
                worker = None
                kill_children()
            os.write(answers, json.dumps(answer).encode() + b"\n")
    except (TrainerGone, BrokenPipeError):
        pass
    finally:
        kill_children()


class TrainerGone(Exception):
    """The trainer has closed its end, or died."""


def _from_trainer(lines: "PipeLines", trainer: int) -> bytes:
    """The next line. A process that the trainer has forked may hold its end open, so its parentage is looked at too."""
    while (line := lines.take()) is None:
        readable, _, _ = select.select([lines.fd], [], [], LOOKS_UP_S)
        if os.getppid() != trainer or (readable and not lines.read()):
            raise TrainerGone
    return line


class PipeLines:
    """The lines of a pipe, read as they come."""

    def __init__(self, fd: int, longest: int | None = None) -> None:
        self.fd, self._longest, self._held, self._ended = fd, longest, bytearray(), False

    def read(self) -> bool:
        """Take in what is there; whether the other end is open."""
        data = os.read(self.fd, 1 << 16)
        self._held += data
        if self._longest and len(self._held) > self._longest:
            raise WorkerFailed("wrote into the pipe", "wrote into the pipe of its answers")
        return bool(data)

    def take(self) -> bytes | None:
        """The next whole line; None: there is none yet."""
        line, newline, rest = self._held.partition(b"\n")
        if not newline:
            return None
        self._held = bytearray(rest)
        return bytes(line)

    def next(self) -> bytes | None:
        """Wait for the next line; None: the other end is closed."""
        while (line := self.take()) is None:
            if not self.read():
                return None
        return line


class Worker:
    """A forked process that has imported the functions, and the pipes to it.

    Attributes:
        code: that they are made of, see `code_of`.
    """

    def __init__(self, settings: Settings, trainer: int) -> None:
        """Raises `WorkerFailed` where a function cannot be imported, or its code is not that of an earlier worker."""
        self._settings, self._trainer, self._parent, self._turn = settings, trainer, os.getppid(), 0
        self._tail, self._status = b"", None
        ask, self._ask = os.pipe()
        self._answers, answer = os.pipe()
        self._printed, printed = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _work(settings, ask, answer, printed)
        for fd in (ask, answer, printed):
            os.close(fd)
        os.set_blocking(self._ask, False)
        os.set_blocking(self._printed, False)
        self._lines = PipeLines(self._answers, LINE)
        try:
            found = self._wait(b"", settings["import_s"]).get("code")
            self.code: dict[str, str] = found if isinstance(found, dict) else {}
            before = settings.get("code")
            if before is not None and (edited := _edited(before, self.code)):
                raise WorkerFailed("was edited", f"{edited} has changed since the run began: start the run again")
            settings["code"] = self.code
        except BaseException:
            self._close()
            raise

    def call(self, case: Json) -> Json:
        """The answer to one case. The worker is not to be used any more after a `WorkerFailed`."""
        self._turn += 1
        if self._turn % MOST_BELOW == 0 and len(below(self._pid)) > MOST_BELOW:
            self._close()
            raise WorkerFailed("left processes behind", f"left more than {MOST_BELOW} processes behind")
        request = json.dumps({**case, "turn": self._turn}).encode() + b"\n"
        try:
            return self._wait(request, self._settings["timeout_s"])
        except BaseException:
            self._close()
            raise

    def is_gone(self) -> bool:
        """Whether the worker has ended by itself, after its last answer."""
        gone = self._exit_status() is not None
        if gone:
            self._close()
        return gone

    def _exit_status(self) -> int | None:
        """As waitpid(2) has it; None: the worker is alive."""
        if self._status is None:
            ended, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = status if ended else None
        return self._status

    def _close(self) -> None:
        for fd in (self._ask, self._answers, self._printed):
            os.close(fd)

    def _wait(self, request: bytes, limit_s: float) -> Json:
        """Send the request and wait for its answer; each function that begins has `limit_s` from then on."""
        deadline, name = time.monotonic() + limit_s, ""
        while True:
            while (line := self._lines.take()) is not None:
                answer = _parsed(line)
                if answer.get("turn") != self._turn:
                    continue  # of a forked copy of the worker that came late
                if "begin" in answer:
                    deadline, name = time.monotonic() + limit_s, str(answer["begin"])
                elif answer.get("kind") in ENDS_A_WORKER:
                    raise WorkerFailed(str(answer["kind"]), str(answer["error"]), str(answer["name"]))
                else:
                    return {key: value for key, value in answer.items() if key != "turn"}
            left = deadline - time.monotonic()
            if left <= 0:
                raise WorkerFailed("took too long", f"took longer than {limit_s:g} s", name)
            request = self._turn_of_pipes(request, min(left, WAKES_S), name)

    def _turn_of_pipes(self, request: bytes, wait_s: float, name: str) -> bytes:
        """Read and write what can be; the rest of the request."""
        gone = self._exit_status() is not None  # looked at first: all that it answered is in the pipe by then
        reads, writes, _ = select.select(
            [self._trainer, self._answers, self._printed], [self._ask] if request else [], [], 0 if gone else wait_s
        )
        if self._trainer in reads or os.getppid() != self._parent:  # the trainer sends nothing while it waits
            raise TrainerGone
        if self._printed in reads:
            self._read_printed()
        if self._ask in writes:
            try:
                request = request[os.write(self._ask, request[: 1 << 16]) :]
            except BrokenPipeError:
                request = b""
        if self._answers in reads:
            if not self._lines.read():
                self._ended(name)
        elif gone:  # a forked copy may hold the pipe of its answers open
            self._ended(name)
        return request

    def _read_printed(self) -> None:
        with suppress(BlockingIOError):
            self._tail = (self._tail + os.read(self._printed, 1 << 16))[-TAIL:]

    def _ended(self, name: str) -> NoReturn:
        """Raise what is known of a worker that will not answer any more."""
        how = "closed the pipe of its answers"
        deadline = time.monotonic() + 1
        while (status := self._exit_status()) is None and time.monotonic() < deadline:  # it may be on its way out
            time.sleep(0.01)
        self._read_printed()
        if status is not None and status != CLOSED << 8:
            code = os.waitstatus_to_exitcode(status)
            how = f"ended its process with status {code}" if code >= 0 else f"died of {signal.Signals(-code).name}"
        last = self._tail.decode(errors="replace").strip().splitlines()
        raise WorkerFailed(how, how + (f"; it printed last: {last[-1][-200:]}" if last else ""), name)


def _parsed(line: bytes) -> Json:
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise WorkerFailed("wrote into the pipe", "wrote into the pipe of its answers")
    return answer


def kill_children() -> None:
    """Kill what is below this process until nothing is left: orphans of what dies become its own children."""
    deadline = time.monotonic() + KILLED_S
    while (found := below(os.getpid())) and time.monotonic() < deadline:
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.002)


def below(process: int) -> list[int]:
    """All processes that have `process` as an ancestor."""
    of_parent: dict[int, list[int]] = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:
            parent = int(stat.read().rpartition(b")")[2].split()[1])
            of_parent.setdefault(parent, []).append(int(name))
    found = of_parent.get(process, [])
    for one in found:  # grows while it is read
        found += of_parent.get(one, [])
    return found


def _prctl(option: int, value: int) -> None:
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


# --- the worker


def _work(settings: Settings, ask: int, answer: int, printed: int) -> None:
    """What the forked process does; it never returns."""
    code = 1
    try:
        keeper = os.getppid()
        os.setsid()  # its group is its own: os.killpg(0, ...) in a function leaves the keeper alone
        _prctl(SET_PDEATHSIG, signal.SIGKILL)
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

    functions: dict[str, Callable[[str, str, Json], object]] = {}
    for one in settings["functions"]:
        reply({"turn": 0, "begin": one["name"]})
        try:
            functions[str(one["name"])] = find_function(one)
        except BaseException as error:  # an import may raise anything, SystemExit included
            reply({"turn": 0, **_told(error), "kind": "import", "name": one["name"]})
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
            told = {"turn": turn, "name": name, **_told(error)}
        reply(told)


def find_function(one: Json) -> Callable[[str, str, Json], object]:
    """Import a function: {"module", "attribute"}, and with "source" that text of the file "file".

    Raises whatever the module raises, and `TypeError` for what cannot be called with three arguments.
    """
    module = _from_source(one) if "source" in one else importlib.import_module(str(one["module"]))
    attribute = str(one["attribute"])
    function = getattr(module, attribute, None)
    if function is None:
        names = [name for name in vars(module) if not name.startswith("_") and callable(vars(module)[name])]
        raise AttributeError(f"it has no {attribute} (it has: {', '.join(names) or 'no function'})")
    if not callable(function):
        raise TypeError(f"{attribute} is no function")
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{attribute} is async; write a plain function")
    try:
        inspect.signature(function).bind("", "", {})
    except TypeError as error:
        raise TypeError(f"{attribute} is called with (completion, answer, record), but {error}") from error
    except ValueError:
        pass  # of a builtin without a signature
    return function


def _from_source(one: Json) -> types.ModuleType:
    """The text that the trainer read at its start, so that a file edited since does not change the reward of a run."""
    file, name = str(one["file"]), str(one["module"])
    if getattr(sys.modules.get(name), "__file__", None) == file:
        return sys.modules[name]  # of another function of the same file
    if name in sys.modules or name in sys.stdlib_module_names:
        name = f"reward_{name}"
    module = types.ModuleType(name)
    module.__file__ = file
    sys.modules[name] = module
    if (folder := os.path.dirname(file)) not in sys.path:
        sys.path.insert(0, folder)  # as for a script: modules beside it can be imported
    exec(compile(str(one["source"]), file, "exec"), module.__dict__)
    return module


def code_of(functions: list[Json], before: set[str]) -> dict[str, str]:
    """Name of a module -> digest of its file, of what the functions are made of beside the texts that are known.

    These are the modules that their import has loaded, but for Python's own and those of installed packages; of a
    package that a function is named by, also an installed one, all that was loaded.

    Args:
        before: names of the modules that were there before.
    """
    packages = {str(one["module"]).partition(".")[0] for one in functions if "source" not in one}
    texts = {one["file"] for one in functions if "source" in one}
    found = {}
    for name in sys.modules.keys() - before:
        with suppress(Exception):  # what stands there may be anything, and its file may be none
            file = os.path.abspath(sys.modules[name].__file__ or "")
            others = file.startswith(STDLIB) or any(part in INSTALLED for part in file.split(os.sep))
            if file not in texts and (name.partition(".")[0] in packages or not others):
                with open(file, "rb") as stream:
                    found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _edited(before: dict[str, str], now: dict[str, str]) -> str | None:
    """A module that is another one now."""
    return min((name for name in before.keys() | now.keys() if before.get(name) != now.get(name)), default=None)


class NoReward(Exception):
    """A function returned what is no reward; `kind` tells such values apart."""

    def __init__(self, kind: str, text: str = "") -> None:
        super().__init__(text or kind)
        self.kind = kind


def number_of(value: object) -> float:
    """A finite float of what a function returned: a number of Python, NumPy or a tensor, True and False included."""
    if not isinstance(value, numbers.Real) and callable(item := getattr(value, "item", None)):
        try:
            value = item()
        except Exception as error:
            raise NoReward(f"returned a {type(value).__name__} of more than one number") from error
    if not isinstance(value, numbers.Real):
        raise NoReward("returned None" if value is None else f"returned a {type(value).__name__}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise NoReward(f"returned {number}")
    if abs(number) > LARGEST:
        raise NoReward("returned too large a number", f"returned {number:g}, which is beyond {LARGEST:g}")
    return number


def _told(error: BaseException) -> Json:
    """Kind and text of what a function raised, with the place in the user's file that it came from."""
    if isinstance(error, NoReward):
        return {"kind": error.kind, "error": str(error)}
    kind = type(error).__name__
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = ""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and frame.filename[:1] != "<"
    ]
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        place = ""  # its text has the place
    return {"kind": kind, "error": f"{kind}{': ' if text else ''}{text[:400]}{place}"}


if __name__ == "__main__":
    keep(0, 1)
