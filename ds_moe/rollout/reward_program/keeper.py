"""The keeper's loop: a case from the trainer, its answer from a worker."""

import json
import os
import select
import signal

from ds_moe.rollout.reward_program.processes import SET_CHILD_SUBREAPER, kill_children, prctl
from ds_moe.rollout.reward_program.protocol import PipeLines, Settings, TrainerGone, WorkerFailed
from ds_moe.rollout.reward_program.worker import Worker

LOOKS_UP_S = 2.0  # between two looks at whether the trainer is alive


def keep(requests: int, answers: int) -> None:
    """Answer the trainer's lines until it closes `requests`."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # launchers signal every process; the trainer decides when this one ends
    prctl(SET_CHILD_SUBREAPER, 1)  # orphans of the worker become the keeper's children, wherever they went
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


def _from_trainer(lines: PipeLines, trainer: int) -> bytes:
    """The next line. A process that the trainer has forked may hold its end open, so its parentage is looked at too."""
    while (line := lines.take()) is None:
        readable, _, _ = select.select([lines.fd], [], [], LOOKS_UP_S)
        if os.getppid() != trainer or (readable and not lines.read()):
            raise TrainerGone
    return line
