"""launch/slurm.sbatch with stand-ins for SLURM's commands; with a real SLURM: tests/slurm."""

import os
import re
import signal
import subprocess
import time

import pytest

from ds_moe.engine.cpu import cpu_settings
from tests.launch.stand_ins import (
    FAKE_SCONTROL,
    FAKE_SRUN,
    HOSTILE,
    ROOT,
    RUN,
    dry_run,
    programs,
    seen,
    shell,
    surroundings,
    write_run,
)
from tests.launcher import HANGS_S

SCRIPT = ROOT / "launch/slurm.sbatch"
EIGHT_GPUS = "#!/bin/bash\n" + "".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'\n" for i in range(8))
NO_DRIVER = "#!/bin/bash\necho 'NVIDIA-SMI has failed: is the driver running?'\nexit 9\n"
MANAGED = "#!/bin/bash\necho 'NodeName=node0 CPUTot=64'\necho '   Gres=gpu:h100:8(S:0-1)'\n"
NO_GRES = "#!/bin/bash\necho 'NodeName=node0 CPUTot=64'\necho '   Gres=(null)'\n"


# --- GPUs


def started(tmp_path, nvidia_smi=NO_DRIVER, scontrol=NO_GRES, **env):
    """The words after `srun` of a job in such surroundings, and what the script says beside them."""
    env |= {"SLURM_SUBMIT_DIR": str(ROOT), **programs(tmp_path / "bin", nvidia_smi=nvidia_smi, scontrol=scontrol)}
    result = shell("bash", SCRIPT, "--dry-run", write_run(tmp_path), env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout.split(), result.stderr


def value(words, option):
    return words[words.index(option) + 1]


@pytest.mark.parametrize(
    ("gpus", "env"),
    [
        (8, {"nvidia_smi": EIGHT_GPUS}),
        (8, {"nvidia_smi": EIGHT_GPUS, "RANKS_PER_NODE": "8"}),
        (4, {"nvidia_smi": EIGHT_GPUS, "RANKS_PER_NODE": "4"}),
        (4, {"nvidia_smi": EIGHT_GPUS, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}),
        (4, {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "RANKS_PER_NODE": "4"}),
        (2, {"CUDA_VISIBLE_DEVICES": "MIG-1a,MIG-2b"}),
        (8, {"SLURM_GPUS_ON_NODE": "8"}),
        (8, {"SLURM_GPUS_PER_NODE": "8"}),
        (8, {"SLURM_GPUS_PER_NODE": "h100:8", "nvidia_smi": EIGHT_GPUS, "scontrol": MANAGED}),
        (4, {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "4"}),
        (8, {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "1"}),
        (8, {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS": "16", "SLURM_JOB_NUM_NODES": "2"}),
    ],
    ids=str,
)
def test_gpus_are_found_whoever_tells_of_them(tmp_path, gpus, env):
    words, said = started(tmp_path, **env)
    assert value(words, "--nproc_per_node") == str(gpus)
    assert "DS_ACCELERATOR=cpu" not in words and said == ""


@pytest.mark.parametrize(
    ("why", "env"),
    [
        ("nvidia-smi -L lists 0", {"RANKS_PER_NODE": "2"}),
        ("CUDA_VISIBLE_DEVICES=", {"nvidia_smi": EIGHT_GPUS, "RANKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": ""}),
        ("CUDA_VISIBLE_DEVICES=-1", {"nvidia_smi": EIGHT_GPUS, "RANKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "-1"}),
        ("SLURM_GPUS_ON_NODE=0", {"SLURM_GPUS_ON_NODE": "0", "SLURM_NTASKS_PER_NODE": "2"}),
        ("DS_ACCELERATOR=cpu", {"nvidia_smi": EIGHT_GPUS, "RANKS_PER_NODE": "2", "DS_ACCELERATOR": "cpu"}),
        ("--gpus-per-node", {"nvidia_smi": EIGHT_GPUS, "RANKS_PER_NODE": "2", "scontrol": MANAGED}),
    ],
)
def test_where_it_trains_on_the_cpu_it_says_so_and_why_in_one_line(tmp_path, why, env):
    words, said = started(tmp_path, **env)
    assert value(words, "--nproc_per_node") == "2" and "DS_ACCELERATOR=cpu" in words
    assert said.startswith("slurm.sbatch: no GPU for this job (") and why in said and said.count("\n") == 1
    assert "2 rank(s) a node train on the CPU" in said


def test_cpu_ranks_get_the_settings_of_ds_moe_train(tmp_path):
    words = dry_run(tmp_path, SCRIPT, write_run(tmp_path), env={"RANKS_PER_NODE": "2", "SLURM_SUBMIT_DIR": str(ROOT)})
    settings = words[words.index("env") + 1 : words.index("bash")]
    # Its ranks find their share of the cores, and the compiled op, by themselves.
    own = ("OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR")
    expected = [f"{name}={value}" for name, value in cpu_settings(2).items() if name not in own]
    assert settings == ["LOG_DIR=runs/slurm-0/start_0", "RANKS_PER_NODE=2", *expected] and expected


FOUR = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
UNEVEN = {"SLURM_GPUS": "4", "SLURM_GPUS_ON_NODE": "3", "SLURM_JOB_NUM_NODES": "2"}


@pytest.mark.parametrize(
    ("complaint", "env"),
    [
        ("8 ranks a node, but 4 GPUs (CUDA_VISIBLE_DEVICES=0,1,2,3)", FOUR | {"RANKS_PER_NODE": "8"}),
        ("9 ranks a node, but 8 GPUs", {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "9"}),
        ("sbatch --gpus=4 put 3 GPUs on this one of 2 nodes", UNEVEN),
        ("RANKS_PER_NODE must be a positive", {"RANKS_PER_NODE": "a[$(touch pwned)]"}),
        ("SLURM_JOB_NUM_NODES must be a positive", {"SLURM_JOB_NUM_NODES": "a[$(touch pwned)]"}),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, complaint, env):
    env |= {"SLURM_SUBMIT_DIR": str(ROOT), **programs(tmp_path / "bin", nvidia_smi=NO_DRIVER, scontrol=NO_GRES)}
    result = shell("bash", SCRIPT, "--dry-run", write_run(tmp_path), env=env, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert complaint in result.stderr and result.stderr.count("\n") == 1
    assert not (ROOT / "pwned").exists()


def on_node(tmp_path, nvidia_smi, **env):
    env |= {"SLURM_NODEID": "1", "LOG_DIR": str(tmp_path), **programs(tmp_path / "bin", nvidia_smi=nvidia_smi)}
    return shell("bash", "launch/on_node.sh", "node0,node1", "env", env={"GLOO_SOCKET_IFNAME": "eth7", **env})


def test_a_node_with_fewer_gpus_than_ranks_is_refused_by_name(tmp_path):
    result = on_node(tmp_path, EIGHT_GPUS, RANKS_PER_NODE="8")
    assert result.returncode == 0 and f"PET_LOG_DIR={tmp_path}/node1" in result.stdout
    for env in ({}, {"CUDA_VISIBLE_DEVICES": "0"}, {"SLURM_GPUS_ON_NODE": "1"}):
        result = on_node(tmp_path, NO_DRIVER, RANKS_PER_NODE="8", **env)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert f"{os.uname().nodename} has {len(env)} GPU(s) for 8 ranks (" in result.stderr
    assert on_node(tmp_path, NO_DRIVER, RANKS_PER_NODE="8", DS_ACCELERATOR="cpu").returncode == 0


# --- what srun gets


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ["--cpu-bind=none"]),
        ({"SLURM_JOB_CPUS_PER_NODE": "64(x2)"}, ["--cpus-per-task", "64"]),
        ({"SLURM_JOB_CPUS_PER_NODE": "64"}, ["--cpus-per-task", "64"]),
        ({"SLURM_JOB_CPUS_PER_NODE": "64,32"}, ["--cpu-bind=none"]),
        ({"SLURM_JOB_CPUS_PER_NODE": "64(x2)", "SLURM_HINT": "nomultithread"}, ["--cpu-bind=none"]),
        (
            {"SLURM_JOB_CPUS_PER_NODE": "64(x2)", "SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_TASK": "1"},
            ["--gpus-per-node", "8", "--cpus-per-task", "64"],
        ),
    ],
)
def test_the_task_of_a_node_gets_all_that_the_job_has_there(tmp_path, given, words):
    env = {"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS_PER_NODE": "8"} | given
    started_with, _ = started(tmp_path, **env)
    before = "+ srun --nodes 2 --ntasks 2 --ntasks-per-node 1 --export=ALL".split()
    assert started_with[: started_with.index("--kill-on-bad-exit=1")] == [*before, *words]


# What srun takes from its environment, of what sbatch puts there for options about one task (src/srun/opt.c).
PER_TASK = {
    "SLURM_CPUS_PER_TASK": "2",
    "SRUN_CPUS_PER_TASK": "2",
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_TRES_PER_TASK": "cpu=2,gres/gpu=1",
    "SLURM_GPU_BIND": "per_task:1",
    "SLURM_TRES_BIND": "gres/gpu:per_task:1",
    "SLURM_NTASKS_PER_GPU": "1",
    "SLURM_NTASKS_PER_TRES": "1",
    "SLURM_CPUS_PER_GPU": "2",
}
PRINTING_SRUN = '#!/bin/bash\nenv >"$SEEN/environment"\n'


def job(tmp_path, fake_train, **env):
    """Environment of a job of two nodes on this machine."""
    env = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "17", **env}
    return surroundings({**fake_train, "SLURM_SUBMIT_DIR": str(tmp_path), **env})


def test_srun_takes_nothing_that_was_meant_for_one_rank(tmp_path, fake_train):
    kept = {"SLURM_GPUS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "2", "SLURM_MEM_PER_CPU": "1000", "SLURM_HINT": "x"}
    env = job(tmp_path, fake_train, **PER_TASK, **kept)
    env |= programs(tmp_path / "bin", srun=PRINTING_SRUN, scontrol=FAKE_SCONTROL)
    result = shell("bash", SCRIPT, RUN, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = set((tmp_path / "seen/environment").read_text().splitlines())
    assert not PER_TASK.keys() & {line.split("=")[0] for line in lines}
    assert lines >= {f"{name}={value}" for name, value in kept.items()}


@pytest.mark.slow
def test_one_torchrun_a_node_is_started(tmp_path, fake_train):
    env = job(tmp_path, fake_train, SLURM_JOB_ID=str(os.getpid()), RANKS_PER_NODE="1")
    env |= programs(tmp_path / "bin", srun=FAKE_SRUN, scontrol=FAKE_SCONTROL)
    result = shell("bash", SCRIPT, RUN, HOSTILE, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert seen(tmp_path) == {str(rank): f"2|{RUN}|{HOSTILE}" for rank in range(2)}
    logs = sorted((tmp_path / f"runs/slurm-{os.getpid()}").glob("start_0/node*/*/attempt_0/0/stdout.log"))
    assert sorted(log.read_text() for log in logs) == ["trained on 0\n", "trained on 1\n"]
    assert not (tmp_path / "pwned").exists()


# --- requeues

# Runs until it gets a USR1, as ranks do that write a checkpoint and end.
STOPPABLE_SRUN = """#!/bin/bash
trap 'exit 1' USR1
touch "$SEEN/started"
for _ in {1..6000}; do sleep 0.1; done
"""
NOTING_SCONTROL = """#!/bin/bash
case $1 in
    requeue) echo "$2" >>"$SEEN/requeued" ;;
    show) if [[ $2 == job ]]; then echo "   RunTime=00:01:58 TimeLimit=00:02:00 TimeMin=N/A"; else echo localhost; fi ;;
esac
"""


def stopped(tmp_path, env, number="USR1", before_the_signal=lambda: None):
    """(status, output) of the job started and sent a signal once srun runs, or of its end before that."""
    (tmp_path / "seen/started").unlink(missing_ok=True)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(["bash", str(SCRIPT), RUN], cwd=tmp_path, env=env, stdout=log, stderr=log)
    deadline = time.monotonic() + HANGS_S
    while not (tmp_path / "seen/started").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if process.poll() is None:
        before_the_signal()
        process.send_signal(signal.Signals[f"SIG{number}"])
    return process.wait(HANGS_S), (tmp_path / "log").read_text()


@pytest.mark.parametrize(("number", "requeued", "status"), [("USR1", True, 0), ("TERM", False, 1)])
def test_usr1_is_handed_on_and_what_has_stopped_is_requeued(tmp_path, fake_train, number, requeued, status):
    env = job(tmp_path, fake_train, SLURM_JOB_NUM_NODES="1")
    env |= programs(tmp_path / "bin", srun=STOPPABLE_SRUN, scontrol=NOTING_SCONTROL)
    code, output = stopped(tmp_path, env, number)
    assert code == status, output
    assert (tmp_path / "seen/requeued").exists() == requeued


def write_checkpoint(tmp_path, step):
    folder = tmp_path / f"run/checkpoints/step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()


@pytest.mark.slow
def test_a_time_limit_shorter_than_the_load_ends_in_one_line_and_not_in_requeues_for_ever(tmp_path, fake_train):
    """Attempts 0 and 1 write a checkpoint, 2 does not; 3 says so."""
    env = job(tmp_path, fake_train, SLURM_JOB_NUM_NODES="1")
    env |= programs(tmp_path / "bin", srun=STOPPABLE_SRUN, scontrol=NOTING_SCONTROL)
    run = tmp_path / RUN
    run.write_text(re.sub(r"output_dir: .*", f"output_dir: {tmp_path}/run", run.read_text()))
    for attempt in range(3):
        env["SLURM_RESTART_COUNT"] = str(attempt)
        save = (lambda attempt=attempt: write_checkpoint(tmp_path, 10 * attempt)) if attempt < 2 else lambda: None
        code, output = stopped(tmp_path, env, before_the_signal=save)
        assert code == 0 and "after USR1: requeued" in output, output
    code, output = stopped(tmp_path, env | {"SLURM_RESTART_COUNT": "3"})
    said = output.splitlines()[-1]
    assert code == 2 and said.startswith("slurm.sbatch: requeued near its time limit (TimeLimit=00:02:00)"), output
    assert said.endswith("step_00000010: loading and a step take longer; give sbatch a longer --time")
    assert (tmp_path / "seen/requeued").read_text().split() == ["17"] * 3 and not (tmp_path / "seen/started").exists()
    # Requeued by hand, with a longer limit, it trains.
    assert stopped(tmp_path, env | {"SLURM_RESTART_COUNT": "4"})[0] == 0


def test_a_job_that_slurm_requeues_for_a_lost_node_goes_on_without_a_new_checkpoint(tmp_path, fake_train):
    env = job(tmp_path, fake_train, SLURM_JOB_NUM_NODES="1", SLURM_RESTART_COUNT="3")
    env |= programs(tmp_path / "bin", srun=STOPPABLE_SRUN, scontrol=NOTING_SCONTROL)
    code, output = stopped(tmp_path, env)
    assert code == 0 and "after USR1: requeued" in output
