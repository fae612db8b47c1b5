"""One process that calls reward functions, as the trainer sees it: started, asked, ended."""

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ds_moe.rollout.reward_program.processes import KILLED_S
from ds_moe.rollout.reward_program.protocol import Json

# It imports this package from where it lies and nothing else from there: what lies beside it need not be on a path, and
# must not come before the modules of Python or of the user.
PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import ds_moe
del sys.path[0]
from ds_moe.rollout.reward_program.keeper import keep
keep(0, 1)
"""
IMPORT_S = 120.0  # for the import of a function
GRACE_S = 30.0  # beyond all limits of the keeper, before the trainer takes it for lost
# What tells a process that it is a rank of a job, or gives it an accelerator. A function that reads them, or a library
# that it imports, would take itself for a rank.
OF_RANKS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
OF_JOBS = ("CROSS_", "DS_", "DEEPSPEED_", "GLOO_", "NCCL_", "OMPI_", "PMI", "SLURM_", "TORCHELASTIC_", "TORCH_NCCL_")
NO_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")


@dataclass(frozen=True)
class Failure:
    """Why a completion has no reward.

    Attributes:
        kind: tells failures apart, for counts.
        error: for a person.
        name: of the reward that failed; empty where it was none of them.
    """

    kind: str
    error: str
    name: str = ""


class RewardProcess:
    """A keeper (see reward_program/) and the pipes to it. One thread at a time asks it; any may `close` it.

    Attributes:
        code: what the functions are made of beside the texts that were given, see `code_of` there; None: not
            known yet.
    """

    def __init__(self, functions: Sequence[Json], timeout_s: float, memory: int) -> None:
        """Start it; `ready` waits for it.

        Args:
            functions: as `find_function` there reads them, with their "name".
            timeout_s: of a call of one of them.
            memory: bytes of data of the process that calls them.
        """
        self._settings = {"functions": functions, "timeout_s": timeout_s, "import_s": IMPORT_S, "memory": memory}
        self.code: dict[str, str] | None = None
        self._limit_s = (IMPORT_S + timeout_s) * len(functions) + KILLED_S + GRACE_S
        self._closed, self._closing = False, threading.Lock()
        self._keeper = self._started()

    def _started(self) -> "subprocess.Popen[bytes]":
        keeper = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=own_environment(),
            start_new_session=True,  # a terminal's Ctrl-C is for the trainer
        )
        self._held = b""
        with suppress(OSError):  # one that is gone at once is found when it is asked
            keeper.stdin.write(json.dumps({**self._settings, "code": self.code}).encode() + b"\n")
            keeper.stdin.flush()
        return keeper

    def ready(self) -> Failure | None:
        """Wait until the functions are imported; why they cannot be."""
        answer = self._answer()
        return answer if isinstance(answer, Failure) else None

    def ask(self, case: Json) -> dict[str, float] | Failure:
        """The value of each function for a completion: {"completion", "answer", "record"}."""
        request = json.dumps(case).encode() + b"\n"
        with self._closing:
            if self._closed:
                return Failure("closed", "the rewards were closed")
            again = self._keeper.poll() is not None
            if again:
                self._keeper = self._started()
        if again and (failed := self.ready()) is not None:
            return failed
        try:
            self._keeper.stdin.write(request)
            self._keeper.stdin.flush()
        except OSError:
            return self._lost()
        return self._answer()

    def _answer(self) -> dict[str, float] | Failure:
        line = self._line()
        if line is None:
            return self._lost()
        told = json.loads(line)
        self.code = told.get("code", self.code)
        return told["values"] if "values" in told else Failure(told["kind"], told["error"], told["name"])

    def _line(self) -> bytes | None:
        """The keeper's next line; None: it is gone, or says nothing."""
        deadline = time.monotonic() + self._limit_s
        out = self._keeper.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(out, selectors.EVENT_READ)
            while b"\n" not in self._held:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    return None
                data = os.read(out, 1 << 16)
                if not data:
                    return None
                self._held += data
        line, _, self._held = self._held.partition(b"\n")
        return line

    def _lost(self) -> Failure:
        """End a keeper that does not answer; the next call starts another."""
        self._end(0.0)
        self._keeper.stdout.close()
        return Failure("lost its process", "its process and that one's keeper were killed, or do not answer")

    def _end(self, patience_s: float) -> None:
        keeper = self._keeper
        with suppress(OSError):
            keeper.stdin.close()  # the keeper kills all that is below it, and ends
        with suppress(subprocess.TimeoutExpired):
            keeper.wait(patience_s)
        keeper.kill()
        keeper.wait()

    def close(self) -> None:
        """End the keeper and all below it."""
        with self._closing:
            self._closed = True
        self._end(KILLED_S)


def own_environment() -> dict[str, str]:
    """The environment of this process, without what would make another one a rank or give it an accelerator."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_RANKS and not name.startswith(OF_JOBS)}
    return {**kept, **dict.fromkeys(NO_DEVICES, ""), "OMP_NUM_THREADS": "1"}
