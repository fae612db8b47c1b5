"""DeepSpeed's compiled op: found without help, and no killed build stands in the way. Ranks and cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_moe.engine import cpu as ops
from tests.launcher import HANGS_S, run_ranks

COMPILED = Path(sys.prefix, "torch_extensions", ops.OP, f"{ops.OP}.so")


def test_only_a_stale_build_lock_is_removed(tmp_path):
    lock = tmp_path / ops.OP / "lock"
    lock.parent.mkdir()
    (lock.parent / f"{ops.OP}.so").touch()
    assert ops.ready(tmp_path) and not ops.remove_stale_lock(tmp_path)
    with open(lock, "w"):  # as a running build has it
        assert ops.lock_holder(lock) == os.getpid() and not ops.ready(tmp_path)
        assert not ops.remove_stale_lock(tmp_path) and lock.exists()
    assert ops.remove_stale_lock(tmp_path) and ops.ready(tmp_path)


def test_the_environments_folder_and_ninja_are_used_where_it_has_compiled_ops(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("PATH", "/usr/bin")
    ops.use_environment()
    assert "TORCH_EXTENSIONS_DIR" not in os.environ and os.environ["PATH"] == "/usr/bin"
    (tmp_path / "torch_extensions").mkdir()
    for _ in range(2):  # a second call changes nothing
        ops.use_environment()
        assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "torch_extensions")
        assert os.environ["PATH"] == f"{tmp_path / 'bin'}:/usr/bin"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/chosen")
    ops.use_environment()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/chosen" and ops.extensions_dir() == Path("/chosen")


@pytest.mark.slow
@pytest.mark.skipif(not COMPILED.exists(), reason="the op has not been compiled into this environment")
def test_a_rank_started_by_hand_finds_the_op(tmp_path):
    code = "from ds_moe.engine.start import start_distributed; start_distributed(1)"
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_EXTENSIONS_DIR"}
    environment |= {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
    built = COMPILED.stat().st_mtime_ns
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, timeout=HANGS_S)
    assert COMPILED.stat().st_mtime_ns == built
    assert not (tmp_path / ".cache/torch_extensions").exists()


@pytest.mark.parametrize(
    ("slurm", "quota", "cores"),
    [
        (None, None, 64),
        ("16", None, 16),
        ("96", None, 64),
        ("", "max 100000", 64),
        (None, "400000 100000", 4),
        ("16", "50000 100000", 1),
    ],
)
def test_the_cores_of_a_job_are_those_it_may_use(slurm, quota, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(ops, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if slurm is not None:
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", slurm)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert ops.cores() == cores
    assert ops.cpu_settings(4)["OMP_NUM_THREADS"] == str(max(1, cores // 4))


@pytest.mark.parametrize(
    ("launcher", "chosen", "threads"),
    [
        ("forked", None, 4),
        pytest.param("torchrun", None, 4, marks=pytest.mark.slow),
        pytest.param("torchrun", "2", 2, marks=pytest.mark.slow),
        pytest.param("deepspeed", None, 4, marks=pytest.mark.slow),
    ],
)
def test_each_rank_takes_its_share_of_the_cores_under_every_launcher(launcher, chosen, threads):
    """Of 8 cores; torchrun itself would give each of the two ranks one, DeepSpeed's launcher all."""
    env = {"OMP_NUM_THREADS": chosen, "SLURM_CPUS_ON_NODE": None}
    run = run_ranks("tests/engine/threads.py", 2, env=env, launcher=launcher)
    assert [rank["threads"] for rank in run.json_by_rank] == [threads, threads]
    assert [rank["variable"] for rank in run.json_by_rank] == [str(threads)] * 2  # of ops that are loaded later
    for rank in run.json_by_rank:  # torch gives new groups its own limit, not that of the group of all
        before, after = rank["limits"]
        assert before[0] == 18000 and len(before) > 2 and set(before[1:]) == {1800}
        assert set(after) == {18000}
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer*_{run.json['port']}_*"))  # DeepSpeed leaves it
