"""The hosts of a hostfile: what DeepSpeed reads in it, and a refusal of what DeepSpeed would misread without a word.

`python -m ds_moe.launcher.hostfile FILE` prints a line `host slots` for each.
"""

import re
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ds_moe.errors import UserError, one_line, shown

ENTRY = re.compile(r"^(\S+)\s+slots=(\d+)")  # as in deepspeed/launcher/runner.py
# One host, as ssh knows it. pdsh gives a meaning of its own to commas, brackets, colons, ^, / and a - in front.
HOST = re.compile(r"([A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9_][\w.-]*", re.ASCII)
# What may follow: a comment, or other words of MPI's form, such as max_slots=8.
UNREAD = re.compile(r"(\s+(?!slots=)[^\s=#]+=[^\s#]+)*(\s*#.*)?")
MOST_SLOTS = 4  # digits
FORM = 'write "name slots=N", N the number of its processes'


def read_hostfile(path: str) -> dict[str, int]:
    """Slots of each host in the file's order; `UserError` for what DeepSpeed refuses, or takes for something else."""
    slots: dict[str, int] = {}
    line_of: dict[str, int] = {}
    for number, line in _lines(path):
        where = f"--hostfile {path}:{number}"
        host, count = _entry(where, line)
        if host in slots:
            raise UserError(f"{where}: {host} is on line {line_of[host]} already; give it one line with all its slots")
        slots[host], line_of[host] = count, number
    if not slots:
        raise UserError(f"--hostfile {path} names no host; {FORM}, one a line")
    return slots


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that DeepSpeed does not skip."""
    if not Path(path).is_file():  # DeepSpeed would train on this machine alone
        what = "is not a regular file" if Path(path).exists() else "no such file"
        raise UserError(f"--hostfile {path}: {what}")
    try:
        with open(path) as file:  # in the encoding of the locale, as DeepSpeed opens it
            lines = file.readlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path} cannot be read: {one_line(error)}") from None
    if lines and lines[0].startswith("\ufeff"):
        raise UserError(f"--hostfile {path}:1 begins with a byte order mark; save the file as UTF-8 without one")
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield number, text


def _entry(where: str, line: str) -> tuple[str, int]:
    """(host, slots) of a line."""
    match = ENTRY.match(line)
    if match is None:
        raise UserError(f"{where}: {shown(line)} does not say how many processes; {FORM}")
    host, digits = match.groups()
    if not HOST.fullmatch(host):
        raise UserError(f"{where}: {shown(host)} is not the name of one host; {FORM}")
    if not UNREAD.fullmatch(line, match.end()):
        rest = shown(line[match.end() :])
        raise UserError(f"{where}: {rest} after slots={digits[:20]} is not read; put a # before it")
    if len(digits) > MOST_SLOTS or int(digits) == 0:
        raise UserError(f"{where}: slots={digits[:20]} is not a number of processes; {FORM}")
    return host, int(digits)


def is_here(host: str) -> bool:
    """Whether a host of a hostfile is this machine: one of its addresses can be listened at."""
    with suppress(OSError):  # the name is unknown
        for family, kind, protocol, _, address in socket.getaddrinfo(host.split("@")[-1], 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
    return False


if __name__ == "__main__":
    try:
        for name, count in read_hostfile(sys.argv[1]).items():
            print(name, count)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
