"""Processes of their own for tests of Triton kernels: an interpreter of them is chosen once for all of a process."""

import json
import os
import subprocess
import sys

from tests.launcher import HANGS_S, REPORTS, ROOT


def reported(script, *arguments, **env):
    """What a script in this folder reports."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", REPORTS)}
    command = [sys.executable, "-m", f"tests.moe.{script}", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=inherited | env, capture_output=True, text=True, timeout=HANGS_S)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return {name: value for line in lines for name, value in line.items()}
