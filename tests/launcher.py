"""Start real multi-process runs in tests, through the real launchers, and collect what the ranks report.

    run = run_ranks("tests/distributed/parity.py", 2, ["--ep", "2"])
    assert run.json["loss_diff"] < 1e-6

In the script: `from tests.launcher import report`, then `report(loss_diff=...)`, on one rank or on all, as often as it
likes. Imports take a rank 8 seconds of a core: ranks that need no launcher are forked from a process that has them
(tests/forked.py), unless the environment has DS_MOE_TEST_LAUNCHER=torchrun.
Only the standard library and psutil are imported here: a rank that reports pays nothing.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import psutil

from ds_moe.engine.cpu import remove_stale_lock

ROOT = Path(__file__).resolve().parents[1]
HANGS_S = 1200.0  # seconds after which a process is taken to hang; what takes 5 minutes may take 20 on a busy machine
TAIL_LINES = 40  # of each log, in the error message of a failed run
MARK = "DS_MOE_TEST_RUN"  # environment variable whose value marks the processes of one run
REPORTS = "DS_MOE_TEST_REPORTS"  # environment variable: folder the ranks write their reports to
LAUNCHER = "DS_MOE_TEST_LAUNCHER"  # environment variable: what starts ranks where a test names nothing
_PORTS = itertools.cycle(random.Random(os.getpid()).sample(range(10_000, 30_000), 5_000))
Launcher = Literal["forked", "torchrun", "deepspeed"]


def report(**results: Any) -> None:
    """Called in a rank: hand named JSON-able results to the test that started it. Later values replace earlier ones.

    Without a test around it (the script run by hand), it prints them.
    """
    line = json.dumps(results)
    if REPORTS not in os.environ:
        print(line, flush=True)
        return
    with open(Path(os.environ[REPORTS], f"rank{os.environ['RANK']}.jsonl"), "a") as file:
        file.write(line + "\n")


def leave() -> None:
    """Called last in a rank: closes the process group together, or gloo's threads may abort a rank that exits."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()


class RanksFailed(AssertionError):
    """A run ended non-zero or ran out of time. `run` holds what it had reported and logged until then."""

    def __init__(self, why: str, run: Ranks):
        super().__init__(f"{why}\n{run.tails()}")
        self.run = run


@dataclass
class Ranks:
    """One launched run. `returncode` is the launcher's, None while it runs."""

    command: list[str]
    process: subprocess.Popen | Forked
    folder: Path  # launcher.log, logs/ per rank, reports/
    mark: str
    nproc: int
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0  # wall time of a run that ended

    @property
    def returncode(self) -> int | None:
        return self.process.poll()

    @property
    def json_by_rank(self) -> list[dict[str, Any]]:
        """What each rank reported, in rank order; {} for a rank that reported nothing."""
        results: list[dict[str, Any]] = []
        for rank in range(self.nproc):
            file = self.folder / "reports" / f"rank{rank}.jsonl"
            lines = file.read_text().splitlines() if file.exists() else []
            results.append({key: value for line in lines for key, value in json.loads(line).items()})
        return results

    @property
    def json(self) -> dict[str, Any]:
        """What rank 0 reported."""
        return self.json_by_rank[0]

    def log(self, rank: int) -> str:
        """stdout and stderr of one rank so far."""
        # deepspeed: logs/<time>_rank0.log; torchrun: logs/<id>/attempt_0/<local rank>/{stdout,stderr}.log
        files = sorted((self.folder / "logs").glob(f"*_rank{rank}.log"))
        files += sorted((self.folder / "logs").glob(f"*/attempt_*/{rank}/std*.log"))
        return "".join(file.read_text(errors="replace") for file in files)

    @property
    def output(self) -> str:
        """The launcher's own output, then every rank's log."""
        launcher = (self.folder / "launcher.log").read_text(errors="replace")
        return launcher + "".join(self.log(rank) for rank in range(self.nproc))

    def tails(self) -> str:
        logs = {"launcher": (self.folder / "launcher.log").read_text(errors="replace")}
        logs |= {f"rank {rank}": self.log(rank) for rank in range(self.nproc)}
        tails = ["\n".join([f"--- {name}", *text.splitlines()[-TAIL_LINES:]]) for name, text in logs.items()]
        return "\n".join([f"$ {' '.join(self.command)}", *tails])

    @property
    def _session(self) -> int | None:
        """Of a forked launcher and its ranks, whose environment still looks like that of the process they are from."""
        file = self.folder / "session"
        return int(file.read_text()) if file.exists() else None

    def alive(self) -> Iterator[psutil.Process]:
        """Every living process of the run: launcher, ranks and their workers, in whatever session they are."""
        for process in psutil.process_iter():
            try:
                marked = process.environ().get(MARK) == self.mark
                if (marked or os.getsid(process.pid) == self._session) and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
                continue

    def kill(self, rank: int | None = None, with_signal: signal.Signals = signal.SIGKILL) -> None:
        """Signal one rank, or (default) everything that belongs to the run."""
        for process in list(self.alive()):
            try:
                # The launcher's own environment has no RANK; a rank's data workers share their rank's.
                if rank is None or process.environ().get("RANK") == str(rank):
                    process.send_signal(with_signal)
            except psutil.NoSuchProcess:
                continue

    def wait(self, timeout: float = HANGS_S) -> int:
        """Wait for the end and return the launcher's status. Past `timeout` seconds: kill all, raise RanksFailed."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise RanksFailed(f"not finished after {timeout:.0f} s (killed)", self) from None
        finally:  # also when the test itself is timed out or interrupted
            self.seconds = time.monotonic() - self.started
            self.kill()
            self.process.wait()
        return code

    def wait_for(self, text: str, timeout: float = HANGS_S, rank: int = 0) -> None:
        """Wait until `text` is in the log of `rank`; RanksFailed if the run ends before, or `timeout` seconds pass."""
        deadline = time.monotonic() + timeout
        while text not in self.log(rank):
            if self.returncode is not None or time.monotonic() > deadline:
                ended = f"ended with {self.returncode}" if self.returncode is not None else f"{timeout:.0f} s passed"
                self.kill()
                raise RanksFailed(f"{ended} before rank {rank} wrote {text!r}", self)
            time.sleep(0.05)


class Forked:
    """A launcher that tests/forked.py forks, as a `Popen`. Its processes are in one session, but for those
    that they start as programs of their own, which have the run's MARK in their environment."""

    _server: ClassVar[subprocess.Popen | None] = None

    def __init__(self, folder: Path, **request: Any) -> None:
        if Forked._server is None or Forked._server.poll() is not None:
            command = [sys.executable, "-m", "tests.forked"]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            environment["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # an import of pyarrow would start it
            Forked._server = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)
        self.folder, self.server = folder, Forked._server
        self.server.stdin.write(json.dumps({"folder": str(folder), **request}).encode() + b"\n")
        self.server.stdin.flush()

    def poll(self) -> int | None:
        if (status := self.folder / "status").exists():
            return int(status.read_text())
        return None if self.server.poll() is None else 1

    def wait(self, timeout: float = HANGS_S) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("tests.forked", timeout)
            time.sleep(0.02)
        return status


def free_port() -> int:
    """A port that is free, and stays so until a rank listens on it: systems give clients and port 0 higher numbers."""
    while True:
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port := next(_PORTS)))
            return port


def start_ranks(
    target: str | Path,
    nproc: int,
    args: Sequence[str | Path] = (),
    env: Mapping[str, str | None] | None = None,
    launcher: Launcher = "torchrun",
) -> Ranks:
    """Start `nproc` CPU processes (gloo) of a script (a path ending in .py) or a module, and return at once.

    `env` adds variables (None removes one). torchrun starts and ends 2 trivial processes in 1.7 s; the deepspeed
    launcher takes 5.6 s (two more imports of DeepSpeed, a poll a second) and passes --local_rank=N before `args`:
    choose it where the launcher itself is part of what is tested. To forked ranks what `env` says to libraries that are
    being imported comes too late, and one alone cannot be killed.
    """
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "reports").mkdir()
    mark = uuid.uuid4().hex
    # CPU runs also on a machine with GPUs; the repository's root makes `tests` and `ds_moe` importable everywhere.
    variables: dict[str, str | None] = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONFAULTHANDLER": "1",
        MARK: mark,
        REPORTS: str(folder / "reports"),
        # A rank of an outer run must not leak its place into this one.
        **dict.fromkeys(["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]),
        **(env or {}),
    }
    environment = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
    if extensions := environment.get("TORCH_EXTENSIONS_DIR"):
        remove_stale_lock(Path(extensions))  # a rank killed while it loaded the op would block every later run

    is_module = not str(target).endswith(".py")
    words = ["--module"] * is_module + [str(target), *map(str, args)]
    logs = str(folder / "logs")
    if launcher == "forked":
        what = {"module": is_module, "target": str(target), "args": [*map(str, args)], "nproc": nproc}
        process = Forked(folder, **what, environment=environment, cwd=str(ROOT), port=free_port())
        return Ranks(["(forked)", *words], process, folder, mark, nproc)
    if launcher == "deepspeed":
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(nproc)]
        command += ["--master_port", str(free_port()), "--enable_each_rank_log", logs, *words]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
        command += ["--redirects", "3", "--log-dir", logs, *words]
    with open(folder / "launcher.log", "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Ranks(command, process, folder, mark, nproc)


def run_ranks(
    target: str | Path,
    nproc: int,
    args: Sequence[str | Path] = (),
    env: Mapping[str, str | None] | None = None,
    timeout: float = HANGS_S,
    launcher: Launcher | None = None,
    check: bool = True,
) -> Ranks:
    """`start_ranks`, then wait. RanksFailed on a time-out, and, with `check`, on a non-zero status.

    Ranks are forked unless a `launcher` is named or `env` given, which may matter to imports.

    Whatever the end, no process of the run survives it.
    """
    launcher = launcher or ("torchrun" if env else os.environ.get(LAUNCHER, "forked"))
    run = start_ranks(target, nproc, args, env, launcher)
    code = run.wait(timeout)
    if check and code != 0:
        raise RanksFailed(f"ended with status {code} after {run.seconds:.0f} s", run)
    return run
