"""Jobs of ranks on this machine, alive side by side, of which one at a time is told to work."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ds_moe.engine.cpu import cpu_settings
from ds_moe.errors import UserError
from ds_moe.launcher.command import free_port
from tools.bench.launched import ROOT
from tools.bench.mix.turns import END, POLL_S, Step, Turn, write
from tools.results import write_json

PROCESSES = 2
ENDS_WITHIN_S = 60
LINES = 30  # of a failed job's output that are shown


class Job:
    """The ranks of one contender, under DeepSpeed's launcher, with one thread each; see `turns.take_turns`."""

    def __init__(self, module: str, plan: dict[str, Any], folder: Path, checkout: Path = ROOT) -> None:
        """Start them in `folder`, which is made. `checkout` holds the build of ds_moe that they import."""
        folder.mkdir(parents=True)
        self._folder, self._log, self._turn = folder, folder / "log.txt", 0
        plan_file = folder / "plan.json"
        write_json({**plan, "folder": str(folder), "processes": PROCESSES}, plan_file)
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(PROCESSES)]
        command += ["--master_port", str(free_port()), "--quiet", "--no_local_rank"]
        command += ["--module", module, str(plan_file)]
        paths = dict.fromkeys([str(checkout), str(ROOT)])  # of a module in both, the checkout's
        settings = cpu_settings(PROCESSES) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=checkout, env={**os.environ, **settings}, start_new_session=True, stdout=log, stderr=log
            )

    def turn(self) -> Turn:
        """Its next turn. Raises `UserError` with the end of its output where a rank has failed."""
        done = self._folder / f"{self._turn}.done"
        self._say("go")
        while not done.exists():
            if self._process.poll() is not None:
                tail = "\n".join(self._log.read_text().splitlines()[-LINES:])
                raise UserError(f"the ranks in {self._folder.name} have ended:\n{tail}")
            time.sleep(POLL_S)
        found = json.loads(done.read_text())
        return Turn([Step(**step) for step in found["steps"]], found["peak_bytes"])

    def end(self) -> None:
        """Let the ranks end, and kill what does not."""
        if self._process.poll() is None:
            self._say(END)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDS_WITHIN_S)
        self.kill()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _say(self, word: str) -> None:
        write(self._folder / f"{self._turn}.go", word)
        self._turn += 1
