"""How tests run the launch scripts: with stand-ins for `ds_moe.train` and for the programs of a cluster."""

import os
import shlex
import subprocess
from pathlib import Path

from tests.launcher import HANGS_S

ROOT = Path(__file__).resolve().parents[2]
RUN = "run file.yaml"  # with a space: quoting must survive every layer
HOSTILE = "train.output_dir=runs/$(touch pwned);`id` 'x'"
# What a scheduler or a user has set around the tests is not for the scripts that they run.
FOREIGN = ("SLURM_", "SRUN_", "CUDA_VISIBLE_DEVICES", "RANKS_PER_NODE", "LOG_DIR", "OMP_NUM_THREADS", "DS_ACCELERATOR")


def surroundings(env=None):
    """Environment of a script: this process's, without what is FOREIGN, and `env`."""
    return {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)} | (env or {})


def shell(*words, env=None, cwd=ROOT):
    environment = surroundings(env)
    return subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANGS_S)


def programs(folder, **texts):
    """Executables of these names and texts in `folder`, and a PATH that begins there."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("_", "-")).write_text(text)
        (folder / name.replace("_", "-")).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def write_run(folder):
    """The demo's run file under the name RUN."""
    text = (ROOT / "ds_configs/runs/demo.yaml").read_text()
    (folder / RUN).write_text(text)
    return folder / RUN


def dry_run(tmp_path, script, *words, env=None):
    """The words of the command that `script` would run; tmp_path holds the run file and is the working directory."""
    write_run(tmp_path)
    result = shell("bash", ROOT / script, "--dry-run", *words, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("+ ")
    return shlex.split(result.stdout)[1:]


# `srun` and `scontrol` as small stand-ins: srun starts the task once a node, one after another in the background, and
# gives each its SLURM_NODEID; scontrol expands the node list. What they start is the real torchrun.
FAKE_SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do case $1 in *=*) shift ;; *) shift 2 ;; esac; done
pids=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@" & pids+=($!); done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
exit $status
"""
FAKE_SCONTROL = '#!/bin/bash\nprintf "localhost\\nlocalhost\\n"\n'
# Stands in for ds_moe.train: notes how each rank was started, then does what THEN says.
FAKE_TRAIN = """
import os, pathlib, sys, time
rank = os.environ["RANK"]
words = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
pathlib.Path(os.environ["SEEN"], rank).write_text("|".join([os.environ["WORLD_SIZE"], *words]))
print("trained on", rank, flush=True)
if os.environ["THEN"] == "die" and rank == "1":
    os.kill(os.getpid(), 9)
if os.environ["THEN"] != "end":
    time.sleep(3000)
"""


def seen(tmp_path):
    return {file.name: file.read_text() for file in (tmp_path / "seen").iterdir()}
