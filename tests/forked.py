"""Ranks without the seconds that their imports take: forked from a process that has imported everything.

`python -m tests.forked` reads requests from its standard input, a line of JSON each, until that is closed: {"folder",
"cwd", "environment", "module", "target", "args", "nproc", "port"}. Each becomes a process of a session of its own that
starts ranks as torchrun does: RANK and its like are set, each has its log, and the first that fails ends the others.
The status it ends with is written to `folder`/status.
"""

import atexit
import gc
import io
import json
import os
import random
import runpy
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

GRACE_S = 30  # that ranks have between SIGTERM and SIGKILL, as torchrun gives them
POLL_S = 0.02


def main() -> None:
    import transformers.models.qwen3_moe.modeling_qwen3_moe
    import transformers.models.qwen3_vl.modeling_qwen3_vl
    import transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe  # noqa: F401

    import ds_moe.train  # noqa: F401

    warm_up()
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("an import has started a thread, which forked ranks would not have")
    gc.collect()
    gc.freeze()  # or every rank's collections would go through all that was imported
    requests, running = open(0, "rb", buffering=0), dict[int, Path]()
    while True:
        if select.select([requests], [], [], POLL_S)[0]:
            if not (line := requests.readline()):
                os._exit(0)  # torch's compiler brings libraries that would print what they leak
            request = json.loads(line)
            running[fork(lambda request=request: launch(request))] = Path(request["folder"])
        for process, status in ended(running):
            folder = running.pop(process)
            (folder / "status.partial").write_text(str(status))
            (folder / "status.partial").rename(folder / "status")


def warm_up() -> None:
    """Do here once what most ranks would do in their first seconds: read the digits, look up DeepSpeed's op, and import
    torch's compiler, which every engine with an optimizer does (by way of DeepSpeed's Muon) and which takes 3 s."""
    import datasets  # noqa: F401
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    from deepspeed.comm.torch import build_shm_op

    from ds_moe.data.digits import digits_samples
    from ds_moe.engine import cpu
    from ds_moe.models.processor import tiny_processor

    tiny_processor("vl")
    for split in ("train", "held-out"):
        digits_samples(split)
    if cpu.ready(cpu.extensions_dir()):
        with redirect_stdout(io.StringIO()):
            build_shm_op()


def launch(request: dict[str, Any]) -> int:
    """What a launcher does; returns its status."""
    os.setsid()
    folder = Path(request["folder"])
    (folder / "session").write_text(str(os.getpid()))
    redirect(folder / "launcher.log")
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    (folder / "logs").mkdir()
    running = {fork(lambda rank=rank: run_rank(request, rank)): rank for rank in range(request["nproc"])}
    failed, deadline = 0, None
    while running:
        for process, status in ended(running):
            rank = running.pop(process)
            if status and not failed:
                print(f"rank {rank} ended with {status}; the others are ended", flush=True)
                failed, deadline = status, time.monotonic() + GRACE_S
                signal_all(running, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            signal_all(running, signal.SIGKILL)
        time.sleep(POLL_S)
    return 1 if failed else 0


def run_rank(request: dict[str, Any], rank: int) -> int:
    redirect(Path(request["folder"]) / "logs" / f"forked_rank{rank}.log")
    world = str(request["nproc"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "ROLE_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(request["port"])
    random.seed()  # Python seeds it once a process
    target = request["target"]
    sys.argv = [target, *request["args"]]
    if request["module"]:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(target).resolve().parent))
        runpy.run_path(target, run_name="__main__")
    return 0


def fork(work: Callable[[], int]) -> int:
    """The process id of a child that does `work` and ends with what it returns, as a program of its own would."""
    if child := os.fork():
        return child
    status = 1
    try:
        status = work()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def redirect(log: Path) -> None:
    """stdout and stderr to a file, and nothing to read."""
    with open(os.devnull, "rb") as nothing, open(log, "ab") as file:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def ended(processes: Iterable[int]) -> list[tuple[int, int]]:
    """(process id, status) of the children that have ended."""
    waited = [os.waitpid(process, os.WNOHANG) for process in list(processes)]
    return [(process, os.waitstatus_to_exitcode(status)) for process, status in waited if process]


def signal_all(processes: Iterable[int], number: int) -> None:
    for process in processes:
        os.kill(process, number)  # a child that has ended is not reaped yet, so its number is nobody else's


if __name__ == "__main__":
    main()
