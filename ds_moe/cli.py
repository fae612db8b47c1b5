"""The `ds-moe` command. Heavy libraries are imported by the command that needs them, so that --help is instant."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from ds_moe import __version__
from ds_moe.errors import UserError

OVERRIDES = "dotted overrides of the run file, e.g. train.lr=1e-4 moe.ep_size=4"
GRACE_S = 30  # seconds that ranks have to end after a signal


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code. A `UserError` is one line on stderr and code 2."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest:  # overrides that stand behind an option: argparse has closed their list by then
        strays = [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]
        if strays:
            parser.error(f"unrecognized arguments: {' '.join(strays)}")
        options.overrides += rest
    try:
        return options.command(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ds-moe", description="Train MoE vision-language models on DeepSpeed.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a run under DeepSpeed's launcher")
    train.add_argument("run", metavar="RUN.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    train.add_argument(
        "--nproc", type=_positive, metavar="N", help="ranks a host (default: all accelerators; 1 on CPU)"
    )
    train.add_argument("--hostfile", metavar="FILE", help='hosts, one "name slots=N" a line')
    train.add_argument("--port", type=_positive, help="of rank 0 (default: a free one; 29500 with a hostfile)")
    train.set_defaults(command=_train)

    doctor = commands.add_parser("doctor", help="say what would fail or be slow, without training")
    doctor.add_argument("run", metavar="RUN.yaml")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    doctor.add_argument("--world", type=_positive, default=1, metavar="N", help="ranks of the job (default 1)")
    doctor.add_argument("--samples", type=_positive, default=64, metavar="K", help="records to decode (default 64)")
    doctor.add_argument("--device-memory", type=float, metavar="GIB", help="of the accelerators the job will have")
    doctor.set_defaults(command=_doctor)

    export = commands.add_parser("export", help="write a checkpoint as a plain transformers folder")
    export.add_argument("checkpoint", type=Path, metavar="CKPT")
    export.add_argument("out", type=Path, metavar="OUT")
    export.add_argument("--layout", choices=("hub", "memory"), default="hub", help="of the experts (default hub)")
    export.set_defaults(command=_export)

    version = commands.add_parser("version", help="print versions")
    version.set_defaults(command=_version)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _train(options: argparse.Namespace) -> int:
    from ds_moe.ds_config import trains_on_cpu
    from ds_moe.runfile import load_run

    load_run(options.run, options.overrides)  # one complaint here instead of one from every rank
    on_cpu = trains_on_cpu()
    command = launch_command(options.run, options.overrides, options.nproc, options.hostfile, options.port, on_cpu)
    return _run_in_group(command, {**(_cpu_settings(options.nproc or 1) if on_cpu else {}), **os.environ})


def launch_command(
    run: str, overrides: list[str], nproc: int | None, hostfile: str | None, port: int | None, on_cpu: bool
) -> list[str]:
    """The argument list of DeepSpeed's launcher for a run. `nproc` is ranks a host."""
    launcher = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if launcher is None:
        raise UserError("the deepspeed command is not on the PATH: install DeepSpeed in this environment")
    command = [launcher]
    if hostfile is not None:
        if not Path(hostfile).is_file():
            raise UserError(f"--hostfile {hostfile}: no such file")
        command += ["--hostfile", hostfile]
        command += ["--master_port", str(port)] if port else []
    else:
        command += ["--master_port", str(port or _free_port())]
    nproc = nproc or (1 if on_cpu and hostfile is None else None)
    if nproc:
        command += ["--num_accelerators", str(nproc)]
    return [*command, "--quiet", "--no_local_rank", "--module", "ds_moe.train", run, *overrides]


def _cpu_settings(nproc: int) -> dict[str, str]:
    """Environment of CPU ranks, where the user's own says nothing else.

    The MALLOC_ values keep glibc from handing the experts' buffers back after every step, up to a third of a step.
    """
    settings = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc)),
        "MALLOC_MMAP_THRESHOLD_": str(2**32),
        "MALLOC_TRIM_THRESHOLD_": str(2**35),
    }
    if sys.prefix != sys.base_prefix:  # where `make setup` compiles DeepSpeed's communication op
        settings["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix, "torch_extensions"))
    return settings


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_in_group(command: list[str], environment: dict[str, str]) -> int:
    """Run to the end in a process group of its own; SIGINT and SIGTERM go to all of it, so that no rank is left."""
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        os.killpg(process.pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
        if received:  # the launcher does not wait for its ranks then
            _end_group(process.pid)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code  # as shells report a death by signal


def _end_group(group: int) -> None:
    """Wait for the last process of a group, and kill what is left after GRACE_S."""
    deadline = time.monotonic() + GRACE_S
    while _alive(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    if _alive(group):
        os.killpg(group, signal.SIGKILL)


def _alive(group: int) -> bool:
    import psutil  # DeepSpeed depends on it

    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        except ProcessLookupError:
            continue
    return False


def _doctor(options: argparse.Namespace) -> int:
    from ds_moe.doctor import diagnose, report

    findings = diagnose(options.run, options.overrides, options.world, options.samples, options.device_memory)
    return report(findings, sys.stdout)


def _export(options: argparse.Namespace) -> int:
    from ds_moe.export import export_checkpoint

    export_checkpoint(options.checkpoint, options.out, options.layout)
    return 0


def _version(options: argparse.Namespace) -> int:
    from importlib import metadata

    print(f"ds_moe {__version__}")
    for name in ("torch", "deepspeed", "transformers"):
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name} missing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
