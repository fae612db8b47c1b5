"""launch/slurm.sbatch under a real SLURM of two nodes: signals, requeues, a lost node, and what is not requeued."""

import os
import re
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.test_resume import DRIFT, LAST, RUN, bit_equal, checkpoints, differences, position, tensors
from tests.launcher import ROOT, run_ranks
from tests.slurm import cluster
from tests.slurm.cluster import NODES, Slurm, slurm

LACKING = cluster.lacking()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(LACKING is not None, reason=str(LACKING))]
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
START_S = 600  # for the ranks' imports on a busy machine


def is_python(process: psutil.Process) -> bool:
    """Not by its name, which torchrun changes, nor by psutil, which keeps what it was before an exec."""
    try:
        return Path(os.readlink(f"/proc/{process.pid}/exe")).name.startswith("python")
    except OSError:  # it has just ended
        return False


class Job:
    """A job of launch/slurm.sbatch; its files lie in `folder`."""

    def __init__(self, slurm: Slurm, folder: Path, options: list[str], overrides: list[str], ranks_per_node: int = 1):
        self.slurm, self.folder = slurm, folder
        self.overrides = [f"train.output_dir={folder}/run", *overrides]
        words = ["--output", folder / "output", *options, "launch/slurm.sbatch", RUN, *self.overrides]
        env = {
            "VIRTUAL_ENV": sys.prefix,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "RANKS_PER_NODE": str(ranks_per_node),
            "LOG_DIR": f"{folder}/logs",
        }
        self.id = slurm.submit(*words, cwd=ROOT, env=env)

    @property
    def output(self) -> str:
        file = self.folder / "output"
        return file.read_text() if file.exists() else ""

    def wait_for_text(self, pattern: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.output):
            state = self.slurm.state(self.id)
            assert state not in ENDED and time.monotonic() < deadline, f"{state} before {pattern!r}:\n{self.output}"
            time.sleep(0.1)

    def wait_for(self, *states: str, timeout: float = START_S) -> str:
        try:
            return self.slurm.wait_for(self.id, *states, timeout=timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output[-4000:]}") from None

    def wait_for_launchers(self) -> None:
        """Until torchrun itself runs on every node; srun, env and bash have it among their arguments before."""
        deadline = time.monotonic() + START_S
        while not all(any(is_python(one) for one in host.processes("/torchrun")) for host in self.slurm.net.hosts):
            assert time.monotonic() < deadline, f"no torchrun:\n{self.output}"
            time.sleep(0.05)

    def finish(self) -> None:
        state = self.wait_for(*ENDED)
        assert state == "COMPLETED", f"{state}\n{self.output[-4000:]}"

    @property
    def starts(self) -> int:
        return 1 + int(self.slurm.job(self.id)["Restarts"])


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.wait_for_nodes(timeout=START_S)
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(two_nodes, tmp_path_factory) -> Job:
    """A run on both nodes that nothing happened to."""
    job = Job(two_nodes, tmp_path_factory.mktemp("undisturbed"), [], [])
    job.finish()
    return job


def test_a_finished_run_is_not_requeued_and_each_rank_has_its_log(undisturbed):
    assert undisturbed.starts == 1
    logs = undisturbed.folder / "logs" / "start_0"
    for node in range(NODES):
        names = sorted(path.name for path in logs.glob(f"node{node}/*/attempt_0/0/*.log"))
        assert names == ["stderr.log", "stdout.log"]
    assert (checkpoints(undisturbed.folder / "run") / LAST).is_dir()
    assert "VIRTUAL_ENV" not in undisturbed.output  # no environment is printed


def test_stopped_by_usr1_requeued_and_resumed_equals_undisturbed_bit_for_bit(two_nodes, undisturbed, tmp_path):
    job = Job(two_nodes, tmp_path, [], ["data.num_workers=1"])
    job.wait_for_text(r"step +5/24", START_S)
    two_nodes.command("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for("PENDING")
    saved = [path.name for path in checkpoints(tmp_path / "run").glob("step_*")]
    assert saved and LAST not in saved, "nothing was left to resume"
    two_nodes.start_soon(job.id)
    job.finish()
    assert job.starts == 2 and f"resumed from {checkpoints(tmp_path / 'run') / max(saved)}" in job.output
    assert (tmp_path / "logs" / "start_1").is_dir()
    ours, theirs = (checkpoints(one.folder / "run") / LAST for one in (job, undisturbed))
    assert bit_equal(tensors(ours), tensors(theirs))  # weights and Adam's moments
    assert position(ours) == position(theirs)
    for rank in range(NODES):
        name = f"rng-{rank:05d}.safetensors"
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_before_the_time_limit_a_checkpoint_is_written_and_the_job_requeued(two_nodes, tmp_path):
    options = ["--time=2", "--signal=B:USR1@40"]  # instead of 120 s before the limit
    job = Job(two_nodes, tmp_path, options, ["train.steps=100000", "checkpoint.every=50000"])
    job.wait_for_text("step +2/100000", START_S)
    job.wait_for("PENDING")
    two_nodes.command("scancel", job.id)
    assert len(list(checkpoints(tmp_path / "run").glob("step_*"))) == 1, job.output
    assert "after USR1: requeued" in job.output


def test_a_signal_while_ranks_still_start_is_neither_lost_nor_does_it_kill_the_launchers(two_nodes, tmp_path):
    job = Job(two_nodes, tmp_path, [], [])
    job.wait_for("RUNNING")
    job.wait_for_launchers()
    two_nodes.command("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for("PENDING")
    assert "received SIGUSR1 before the first step" in job.output and "exitcode  : 138" in job.output
    two_nodes.start_soon(job.id)  # it has no more to go on from than before, and says so
    assert job.wait_for(*ENDED) == "FAILED"
    said = r"requeued near its time limit \(TimeLimit=.*\) with no checkpoint after the start: .* --time\n"
    assert re.search(said, job.output)


def test_a_lost_node_requeues_the_job_which_resumes_resharded_on_the_other(two_nodes, tmp_path, show):
    """Four ranks on two nodes become two on one."""
    overrides = ["train.micro_batch_size=2", "train.watchdog_s=40"]
    job = Job(two_nodes, tmp_path, ["--nodes=1-2"], overrides, ranks_per_node=2)
    job.wait_for_text("checkpoint .*step_00000016", START_S)
    cut = time.monotonic()
    two_nodes.net.unplug(1)
    try:
        job.wait_for("PENDING")
        requeued = time.monotonic()
        two_nodes.start_soon(job.id)
        job.finish()
    finally:
        two_nodes.net.plug(1)
        two_nodes.wait_for_nodes(timeout=START_S)
    show(f"a node cut off: requeued after {requeued - cut:.0f} s (SlurmdTimeout={cluster.SILENT_S})")
    assert job.starts == 2 and re.search(r"resumed from .* \(saved by 4 ranks with ep_size 2\)", job.output)
    reference = tmp_path / "reference"
    run_ranks("ds_moe.train", 4, [RUN, f"train.output_dir={reference}", *overrides])
    ours, theirs = tensors(checkpoints(tmp_path / "run") / LAST), tensors(checkpoints(reference) / LAST)
    drift = [differences(ours, theirs, kind) for kind in ("weight/", "exp_avg/", "exp_avg_sq/")]
    show(f"drift after 4 -> 2 ranks: weights {drift[0]:.1e}, Adam's moments {drift[1]:.1e} and {drift[2]:.1e}")
    assert max(drift) <= DRIFT
    assert position(checkpoints(tmp_path / "run") / LAST) == position(checkpoints(reference) / LAST)


def test_a_run_that_fails_is_not_requeued(two_nodes, tmp_path):
    job = Job(two_nodes, tmp_path, [], ["moe.ep_size=3"])
    assert job.wait_for(*ENDED) == "FAILED"
    assert job.starts == 1 and "moe.ep_size=3" in job.output


def test_a_cancelled_run_is_not_requeued_and_leaves_nothing_behind(two_nodes, tmp_path):
    job = Job(two_nodes, tmp_path, [], [])
    job.wait_for_text("step +2/24", START_S)
    two_nodes.command("scancel", job.id)
    assert job.wait_for(*ENDED) == "CANCELLED"
    two_nodes.wait_for_nodes(timeout=START_S)
    assert job.starts == 1
    assert not [host for host in two_nodes.net.hosts if host.processes("ds_moe.train")]


PRINTING_TORCHRUN = """#!/bin/bash
echo "node $SLURM_NODEID: $SLURM_CPUS_ON_NODE cores, ${SLURM_GPUS_ON_NODE:-0} GPUs, $RANKS_PER_NODE ranks"
"""


def all_of_a_node(two_nodes, folder, *options):
    """(state, output) of a job whose torchrun prints what it has."""
    binaries = folder / "venv/bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(sys.executable)
    (binaries / "torchrun").write_text(PRINTING_TORCHRUN)
    (binaries / "torchrun").chmod(0o755)
    env = {"VIRTUAL_ENV": str(folder / "venv"), "LOG_DIR": f"{folder}/logs", "RANKS_PER_NODE": "", "DS_ACCELERATOR": ""}
    job = two_nodes.submit("--output", folder / "output", *options, "launch/slurm.sbatch", RUN, cwd=ROOT, env=env)
    state = two_nodes.wait_for(job, *ENDED, timeout=START_S)
    return state, (folder / "output").read_text()


@pytest.mark.parametrize(
    ("options", "cores"),
    [
        (["--gpus-per-node=2"], 1),
        (["--gres=gpu:2", "--cpus-per-task=4"], 4),
        (["--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=2"], 4),
        (["--ntasks-per-node=2", "--cpus-per-task=2", "--gpus-per-task=1"], 4),
        (["--gpus-per-node=2", "--ntasks-per-gpu=1"], 2),
        (["--gpus-per-node=2", "--cpus-per-gpu=2", "--gpu-bind=single:1"], 4),
        (["--exclusive"], 4),
        (["--gpus=4", "--mem-per-gpu=100"], 1),
        (["--export=VIRTUAL_ENV,LOG_DIR", "--gpus-per-node=2"], 1),
        (["--hint=nomultithread", "--gpus-per-node=2", "--cpus-per-task=2"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_node_has_all_that_sbatch_was_asked_for_a_task_of_each_rank(two_nodes, tmp_path, options, cores):
    state, output = all_of_a_node(two_nodes, tmp_path, *options)
    assert state == "COMPLETED", output
    lines = sorted(line for line in output.splitlines() if line.startswith("node "))
    assert lines == [f"node {node}: {cores} cores, 2 GPUs, 2 ranks" for node in range(NODES)], output


def test_gpus_that_are_not_the_same_on_each_node_are_refused_in_one_line(two_nodes, tmp_path):
    state, output = all_of_a_node(two_nodes, tmp_path, "--gpus=3")
    assert state == "FAILED" and output.count("\n") == 1
    assert re.match(r"slurm.sbatch: sbatch --gpus=3 put [12] GPUs on this one of 2 nodes: give --gpus-per-node", output)
