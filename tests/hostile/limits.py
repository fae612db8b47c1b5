"""What every refusal of hostile input has to be: one short line, soon, and at little cost in memory."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_moe.errors import UserError

SECONDS = 2.0  # of processor time: other processes do not count
MEBIBYTES = 500
CHARACTERS = 900  # of a message; hostile values are quoted in part


class Payload:
    """Makes the folder `canary` when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def refusal(call: Callable[[], Any], *parts: object, lines: int = 1) -> str:
    """The message of the `UserError` that `call` ends in; it holds all `parts`, on so many lines at most."""
    before, began = _memory("VmRSS"), time.process_time()
    _forget_peak()
    with pytest.raises(UserError) as caught:
        call()
    assert time.process_time() - began < SECONDS
    assert _memory("VmHWM") - before < MEBIBYTES
    message = str(caught.value)
    assert message and len(message.splitlines()) <= lines and len(message) < CHARACTERS * lines, message[:2000]
    assert "Traceback" not in message
    missing = [str(part) for part in parts if str(part) not in message]
    assert not missing, f"{missing} not in: {message}"
    return message


def _memory(kind: str) -> float:
    """MiB of this process, by the kernel's name; the peak of all its life where `_forget_peak` may not work."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not let a process reset the peak of its memory")
