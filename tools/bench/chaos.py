"""Train a tiny model through one fault after another, and compare what comes out with an undisturbed run, bit for bit.

    python -m tools.bench.chaos --rounds 30 [--background] [--seed S] [--json FILE] [--keep FOLDER]

In each round the job (two CPU processes) is started, resumes, trains some steps, and meets one fault at a random
moment. Filling the disk needs a small tmpfs, which root alone can mount; without it that fault is left out.
Exit status 0 only if every fault was survived: no hang, no damaged checkpoint loaded, no more steps lost than a save
interval (two where the newest checkpoint was damaged), and a final checkpoint equal to the undisturbed run's.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.table import Table

from ds_moe.checkpoint.files import Reader, incomplete, step_folders
from tools.bench.launched import ROOT
from tools.results import command_line, new_table, show, write_json

RUN = "tests/runs/resume.yaml"
EVERY = 5  # steps between checkpoints
MOST_STEPS = 12  # of a round before its fault
TAIL = 40  # steps after the last fault
WATCHDOG_S = 10.0
END_S = WATCHDOG_S + 75  # within which a job must end: launchers wait half a minute for a stopped rank
IN_FLIGHT = 2  # steps more that a fault may cost while a checkpoint is being written in the background
START_S = 240.0  # within which a started job must take a step
DISK = 96 * 2**20  # bytes of the tmpfs
MARK = "DS_MOE_CHAOS"  # environment variable that marks the job's processes
STEP = re.compile(r"^step +(\d+)/\d+ ", re.MULTILINE)
RESUMED = re.compile(r"^resumed from \S*/(step_\d+) at step (\d+)", re.MULTILINE)


@dataclass
class Job:
    log: Path
    process: subprocess.Popen

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def step(self) -> int:
        """The last step that it has reported, or resumed at."""
        steps = [int(found) for found in STEP.findall(self.text)]
        return steps[-1] if steps else self.resumed_at

    @property
    def resumed_at(self) -> int:
        found = RESUMED.search(self.text)
        return int(found[2]) if found else 0

    def processes(self) -> Iterator[psutil.Process]:
        """All that live, data workers too."""
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(MARK) == self.log.name and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def rank(self, rank: int) -> psutil.Process | None:
        """The process of a rank; its data workers are its children."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("RANK") == str(rank):
                    return process
        return None

    def kill(self) -> None:
        for process in list(self.processes()):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def ends(self, within_s: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(within_s)
        return self.process.poll() is not None


@dataclass
class Round:
    fault: str
    at_step: int
    ended_s: float = 0.0  # seconds from the fault to the job's end
    hung: bool = False
    damaged: str | None = None  # name of the checkpoint that was damaged
    lost: int = 0  # steps that the next start had to repeat
    corrupt_load: bool = False


@dataclass
class Chaos:
    output: Path
    logs: Path
    steps: int
    dice: random.Random
    background: bool
    rounds: list[Round] = field(default_factory=list)

    def start(self) -> Job:
        """With or without data workers."""
        more = [f"data.num_workers={self.dice.choice([0, 0, 1])}", f"checkpoint.background={self.background}".lower()]
        return start(self.output, self.steps, self.logs / f"start-{len(self.rounds):03d}.log", more)

    def one_round(self, fault: str) -> None:
        job = self.start()
        self._account(job)
        target = job.step + self.dice.randint(1, MOST_STEPS)
        wait_for(lambda: job.step >= target, START_S, job)
        time.sleep(self.dice.random() * 0.3)
        now = Round(fault, job.step)
        began = time.monotonic()
        FAULTS[fault](self, job)
        now.hung = not job.ends(END_S)
        now.ended_s = time.monotonic() - began
        now.at_step = job.step
        job.kill()
        (self.output / "filler").unlink(missing_ok=True)
        if fault in DAMAGES:
            now.damaged = damage(self.output / "checkpoints", DAMAGES[fault], self.dice)
        self.rounds.append(now)

    def finish(self) -> None:
        job = self.start()
        self._account(job)
        if not job.ends(START_S + self.steps) or job.process.returncode:
            raise SystemExit(f"chaos: the last start did not complete the run; see {job.log}")

    def _account(self, job: Job) -> None:
        """What the last round cost, as soon as this start has said what it resumed from."""
        wait_for(lambda: bool(STEP.search(job.text)), START_S, job)
        if self.rounds:
            before = self.rounds[-1]
            before.lost = before.at_step - job.resumed_at
            found = RESUMED.search(job.text)
            before.corrupt_load = bool(before.damaged and found and found[1] == before.damaged)


def start(output: Path, steps: int, log: Path, more: list[str]) -> Job:
    command = [sys.executable, "-m", "ds_moe.cli", "train", RUN, "--nproc", "2", f"train.output_dir={output}"]
    command += [f"train.steps={steps}", f"checkpoint.every={EVERY}", f"train.watchdog_s={WATCHDOG_S}", *more]
    environment = {**os.environ, MARK: log.name, "PYTHONUNBUFFERED": "1", "DS_ACCELERATOR": "cpu"}
    with log.open("w") as out:
        streams = {"stdout": out, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        return Job(log, subprocess.Popen(command, cwd=ROOT, env=environment, **streams))


def wait_for(happened: Callable[[], bool], within_s: float, job: Job) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        if job.process.poll() is not None or time.monotonic() > deadline:
            job.kill()
            raise SystemExit(f"chaos: the job ended or stood still where nothing was done to it; see {job.log}")
        time.sleep(0.02)


# --- faults: what is done to a running job

Fault = Callable[[Chaos, Job], None]
Damage = Callable[[Path, random.Random], None]


def to_a_rank(number: signal.Signals) -> Fault:
    def send(chaos: Chaos, job: Job) -> None:
        process = job.rank(chaos.dice.randrange(2))
        if process is not None:
            process.send_signal(number)

    return send


def kill_all(chaos: Chaos, job: Job) -> None:
    job.kill()


def fill_the_disk(chaos: Chaos, job: Job) -> None:
    with (chaos.output / "filler").open("wb") as file, suppress(OSError):
        while True:
            file.write(b"\0" * 2**16)
            file.flush()


FAULTS: dict[str, Fault] = {
    "SIGKILL a rank": to_a_rank(signal.SIGKILL),
    "SIGKILL all": kill_all,
    "SIGTERM the launcher": lambda chaos, job: job.process.terminate(),
    "SIGTERM a rank": to_a_rank(signal.SIGTERM),
    "SIGUSR1 a rank": to_a_rank(signal.SIGUSR1),
    "SIGSTOP a rank": to_a_rank(signal.SIGSTOP),
    "fill the disk": fill_the_disk,
    **dict.fromkeys(("truncate a file", "flip a byte", "delete a file"), kill_all),
}


# --- damage to the newest checkpoint, once all are dead


def flip(file: Path, dice: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


DAMAGES: dict[str, Damage] = {
    "truncate a file": lambda file, dice: os.truncate(file, dice.randrange(file.stat().st_size)),
    "flip a byte": flip,
    "delete a file": lambda file, dice: file.unlink(),
}


def damage(folder: Path, how: Damage, dice: random.Random) -> str | None:
    """Damage one file of the newest whole checkpoint, if there is an older one to fall back on; its name."""
    whole = [path for path in step_folders(folder) if incomplete(path) is None]
    if len(whole) < 2:
        return None
    how(dice.choice(sorted(file for file in whole[0].rglob("*") if file.is_file() and file.stat().st_size)), dice)
    return whole[0].name


# --- the comparison


def differences(one: Path, other: Path) -> list[str]:
    mine, theirs = Reader(one), Reader(other)
    if set(mine.tensors) != set(theirs.tensors):
        return ["the names of the tensors"]
    found = [key for key in mine.tensors if not bool((mine.read(key) == theirs.read(key)).all())]
    found += [file.name for file in one.glob("rng-*") if file.read_bytes() != (other / file.name).read_bytes()]
    states = [json.loads((path / "state.json").read_text()) for path in (one, other)]
    return found + [key for key in ("step", "data", "adam_step") if states[0][key] != states[1][key]]


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a tmpfs there, if this user may; whether it is one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def plan(rounds: int, can_fill: bool, dice: random.Random) -> list[str]:
    """The faults in a random order, each about as often."""
    kinds = [kind for kind in FAULTS if can_fill or kind != "fill the disk"]
    dealt = list(islice(cycle(kinds), rounds))
    dice.shuffle(dealt)
    return dealt


def table(rounds: list[Round]) -> Table:
    table = new_table(["fault"], ["rounds", "survived", "steps lost", "job ended after"])
    for kind in FAULTS:
        own = [one for one in rounds if one.fault == kind]
        if not own:
            table.add_row(kind, "0", "not tried")
            continue
        ended = [one.ended_s for one in own]
        cells = [len(own), sum(not one.hung and not one.corrupt_load for one in own), max(one.lost for one in own)]
        table.add_row(kind, *map(str, cells), f"{median(ended):.1f} s (max {max(ended):.1f})")
    return table


def main() -> int:
    parser = command_line(__doc__, "--json")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="faults (default 30)")
    parser.add_argument("--background", action="store_true", help="with checkpoint.background")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of faults and moments (default 0)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="of the logs (default: a temporary one, removed)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = Path(temporary)
        logs = options.keep or folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        steps = options.rounds * (MOST_STEPS // 2 + 2) + TAIL
        print(f"undisturbed run of {steps} steps, a checkpoint every {EVERY}", flush=True)
        calm = start(folder / "calm", steps, logs / "calm.log", [])
        if not calm.ends(START_S + 2 * steps) or calm.process.returncode:
            raise SystemExit(f"chaos: the undisturbed run failed; see {calm.log}")
        with small_disk(folder / "disk") as can_fill:
            chaos = Chaos(folder / "disk" / "run", logs, steps, random.Random(options.seed), options.background)
            began = time.monotonic()
            for number, fault in enumerate(plan(options.rounds, can_fill, chaos.dice), start=1):
                chaos.one_round(fault)
                done = chaos.rounds[-1]
                ended = "did not end" if done.hung else f"ended after {done.ended_s:.1f} s"
                print(f"round {number:>3}: {fault} after step {done.at_step}; {ended}", flush=True)
            chaos.finish()
            last = f"checkpoints/step_{steps:08d}"
            differing = differences(chaos.output / last, folder / "calm" / last)
        return report(chaos, differing, time.monotonic() - began, options.json)


def report(chaos: Chaos, differing: list[str], seconds: float, file: Path | None) -> int:
    rounds = chaos.rounds
    figures: dict[str, Any] = {
        "faults": len(rounds),
        "hangs": sum(one.hung for one in rounds),
        "corrupt_loads": sum(one.corrupt_load for one in rounds),
        "save_interval": EVERY,
        "background": chaos.background,
        "most_steps_lost": max((one.lost for one in rounds if not one.damaged), default=0),
        "most_steps_lost_with_the_newest_checkpoint": max((one.lost for one in rounds if one.damaged), default=0),
        "differing": differing,
        "watchdog_s": WATCHDOG_S,
        "seconds": round(seconds),
    }
    most = EVERY + IN_FLIGHT * chaos.background
    within = all(one.lost <= (most + EVERY if one.damaged else most) for one in rounds)
    show(table(rounds))
    print("  ".join(f"{name} {value}" for name, value in figures.items() if name != "differing"))
    equal = "equal, bit for bit" if not differing else f"DIFFERENT: {differing[:5]}"
    print(f"final weights, moments, random states and data position against the undisturbed run's: {equal}")
    write_json(figures | {"rounds": [asdict(one) for one in rounds]}, file, indent=1)
    return 0 if within and not (figures["hangs"] or figures["corrupt_loads"] or differing) else 1


if __name__ == "__main__":
    sys.exit(main())
