"""The process of plain transformers that samples for a run."""

import subprocess
import sys

import pytest

from ds_moe.rollout.engine import EnginesGone
from ds_moe.tasks.rl.online import local


@pytest.mark.parametrize(
    "code, text", [("time.sleep(600)", "has not answered within 0.5 s"), ("sys.exit(7)", "status 7")]
)
def test_a_process_that_stands_still_or_ends_is_gone(monkeypatch, tmp_path, code, text):
    started = []

    def start(dtype):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", f"import sys, time; {code}"], **pipes))
        return started[-1]

    monkeypatch.setattr(local, "_start", start)
    engine = local.LocalEngine("fp32", timeout_s=0.5 if "sleep" in code else 600)
    with pytest.raises(EnginesGone, match=text):
        engine.publish(tmp_path, "r:0")
    engine.close()
    assert started[0].poll() is not None
