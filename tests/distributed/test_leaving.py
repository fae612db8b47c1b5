"""A run that ends, ends: whatever the reason, and with data workers that ignore the signals of launchers."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from PIL import Image

from tests.launcher import HANGS_S, ROOT, free_port

STATUS = {"complete": 0, "crash": 1, "full disk": 2, "bad record": 2, "signal": 128 + signal.SIGTERM}
SAID = {
    "crash": "a bug of ours",
    "full disk": "error: rank 0 could not write",
    "bad record": "train.jsonl:",
    "signal": "received SIGTERM",
}


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory):
    """Records whose images are fine but for the later ones, which are found out when a worker decodes them."""
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (16, 16), (250, 10, 10)).save(folder / "good.png")
    (folder / "bad.png").write_bytes((folder / "good.png").read_bytes()[:60])
    question = [{"type": "image", "image": None}, {"type": "text", "text": "what?"}]
    lines = []
    for number in range(40):
        question[0]["image"] = "bad.png" if number % 4 == 3 else "good.png"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"answer {number}"}]
        lines.append(json.dumps({"messages": messages}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


def start(way, workers, output, bad_data):
    environment = {**os.environ, "MASTER_PORT": str(free_port()), "BAD_DATA": str(bad_data)}
    environment |= {"PYTHONPATH": str(ROOT), "MARK": str(output)}
    command = [sys.executable, "tests/distributed/leaving.py", way, str(workers), str(output)]
    log = (output.parent / f"{output.name}.log").open("w+")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT), log


def of_mark(mark):
    """Processes that carry the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK") == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def check(way, workers, folder, bad_data):
    output = folder / f"{way.replace(' ', '-')}-{workers}"
    process, log = start(way, workers, output, bad_data)
    try:
        status = process.wait(timeout=HANGS_S)
    finally:
        for one in of_mark(str(output)) if process.poll() is None else []:
            one.kill()
    log.seek(0)
    text = log.read()
    assert status == STATUS[way], text[-3000:]
    assert SAID.get(way, "") in text
    until = time.monotonic() + HANGS_S
    while of_mark(str(output)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not of_mark(str(output)), "a process of the run is still there"


def test_a_run_with_workers_ends(tmp_path, bad_data):
    check("full disk", 3, tmp_path, bad_data)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("way", list(STATUS))
def test_every_way_out(way, workers, tmp_path, bad_data):
    check(way, workers, tmp_path, bad_data)
