"""The launch scripts for this machine and for several."""

import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner
from deepspeed.launcher.runner import fetch_hostfile

from tests.launch.stand_ins import HOSTILE, ROOT, RUN, dry_run, seen, shell, surroundings, write_run
from tests.launcher import HANGS_S

SCRIPTS = ["launch/local.sh", "launch/multinode.sh", "launch/slurm.sbatch"]
PARTS = ["launch/on_node.sh", "launch/common.bash"]


@pytest.mark.parametrize("script", [*SCRIPTS, *PARTS, "tools/setup_env.sh", ".ci/run"])
def test_shell_syntax(script):
    result = shell("bash", "-n", script)
    assert result.returncode == 0, result.stderr
    text = (ROOT / script).read_text()
    assert not re.search(r"^\s*(eval|set -x|printenv)\b|\$\*", text, re.M)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    result = shell("bash", script, "--help")
    assert result.returncode == 0 and not result.stderr
    assert "RUN.yaml" in result.stdout and "--dry-run" in result.stdout and "#" not in result.stdout


def test_local_calls_ds_moe_train(tmp_path):
    words = dry_run(tmp_path, "launch/local.sh", RUN, 2, "moe.ep_size=2", HOSTILE, env={"DS_ACCELERATOR": "cpu"})
    assert words[0] == "env" and words[words.index("--num_accelerators") + 1] == "2"
    assert words[-4:] == ["ds_moe.train", RUN, "moe.ep_size=2", HOSTILE]
    assert not (tmp_path / "pwned").exists()


def test_multinode_by_hostfile(tmp_path):
    hostfile = ROOT / "launch/hostfile.example"
    words = dry_run(
        tmp_path,
        "launch/multinode.sh",
        "--hostfile",
        hostfile,
        "--interface",
        "eth7",
        RUN,
        HOSTILE,
        env={"DS_ACCELERATOR": ""},
    )
    assert words[1:3] == ["--hostfile", str(hostfile)]
    assert words[words.index("--master_addr") + 1] == "node-0"
    # What DeepSpeed's pdsh launcher makes of the words, and the shell on the other side of that.
    runner = SimpleNamespace(args=SimpleNamespace(user_args=words[words.index("--no_python") + 1 :]))
    sent = " ".join(PDSHRunner.parse_user_args(runner))
    got = shell("bash", "-c", f"printf '%s\\0' {sent}", cwd=tmp_path).stdout.split("\0")[:-1]
    assert got[:3] == ["env", "GLOO_SOCKET_IFNAME=eth7", "NCCL_SOCKET_IFNAME=eth7"]
    assert got[got.index("bash") :][:3] == ["bash", str(ROOT / "launch/on_node.sh"), "node-0,node-1"]
    assert got[-4:] == ["-m", "ds_moe.train", RUN, HOSTILE]
    assert not (tmp_path / "pwned").exists()
    assert dict(fetch_hostfile(str(hostfile))) == {"node-0": 8, "node-1": 8}


@pytest.mark.parametrize(
    "lines",
    [
        "  # rack 1\nnode-a slots=8\nnode-b slots=8\n",
        "node-a slots=8 # rack 1\nnode-b\tslots=8\n",
        "# from a desktop\r\nnode-a slots=8\r\n\r\nnode-b slots=8\r\n",
        "me@node-a slots=8\nnode-b slots=8 max_slots=8\n",
    ],
)
def test_multinode_reads_a_hostfile_as_deepspeed_does(tmp_path, lines):
    (tmp_path / "hosts").write_bytes(lines.encode())
    words = dry_run(tmp_path, "launch/multinode.sh", "--hostfile", "hosts", RUN)
    assert words[words.index("--master_addr") + 1] == "node-a"
    [hosts] = [word for word in words if "node-b" in word]
    assert hosts.replace("\\", "") == "node-a,node-b"


def test_multinode_hands_on_the_threads_that_the_user_has_chosen(tmp_path):
    (tmp_path / "hosts").write_text("node-a slots=8\nnode-b slots=8\n")
    for chosen in ("", "3"):
        for kind in ("", "cpu"):
            env = {"OMP_NUM_THREADS": chosen, "DS_ACCELERATOR": kind}
            words = dry_run(tmp_path, "launch/multinode.sh", "--hostfile", "hosts", RUN, env=env)
            assert [word for word in words if "OMP_NUM_THREADS" in word] == (["OMP_NUM_THREADS=3"] if chosen else [])


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("node-a\nnode-b\n", ":1: 'node-a' does not say how many processes"),
        ("node-a slots=8\nnode-a slots=8\n", ":2: node-a is on line 1 already"),
        ("# none\n", " names no host"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [("bash", ROOT / "launch/multinode.sh", "--dry-run"), (Path(sys.executable).with_name("ds-moe"), "train")],
)
def test_a_hostfile_that_deepspeed_refuses_is_refused_in_one_line(tmp_path, command, lines, complaint):
    (tmp_path / "hosts").write_text(lines)
    result = shell(*command, "--hostfile", "hosts", write_run(tmp_path), cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: --hostfile hosts{complaint}") and result.stderr.count("\n") == 1


def test_a_single_host_elsewhere_is_not_taken_for_this_machine(tmp_path):
    for name, far in {"192.0.2.7": True, "127.0.0.1": not shutil.which("ip")}.items():
        (tmp_path / "hosts").write_text(f"{name} slots=2\n")
        words = dry_run(tmp_path, "launch/multinode.sh", "--hostfile", "hosts", RUN, HOSTILE)
        assert ("--force_multi" in words) == far and (words[-1] == HOSTILE) == (not far)


def test_multinode_by_torchrun(tmp_path):
    arguments = "--nodes", 4, "--gpus", 8, "--master", "192.0.2.77", RUN, HOSTILE
    words = dry_run(tmp_path, "launch/multinode.sh", *arguments, env={"DS_ACCELERATOR": ""})
    settings, words = words[: words.index("--nnodes")], words[words.index("--nnodes") :]
    assert settings[-1].endswith("/torchrun")
    on_cpus = dry_run(tmp_path, "launch/multinode.sh", *arguments, env={"DS_ACCELERATOR": "cpu"})
    assert on_cpus[0] == "env" and f"MALLOC_TRIM_THRESHOLD_={2**35}" in on_cpus and on_cpus[-len(words) :] == words
    assert words[words.index("--rdzv_endpoint") + 1] == "192.0.2.77:29500"
    assert words[-4:] == ["--module", "ds_moe.train", RUN, HOSTILE]
    if shutil.which("ip"):
        assert words[words.index("--rdzv_conf") + 1] == "is_host=false"


def test_a_node_ignores_usr1_until_its_ranks_heed_it_and_chooses_gloo_s_interface():
    code = "kill -USR1 $$; echo $GLOO_SOCKET_IFNAME"
    chosen = shell("bash", "launch/on_node.sh", "localhost,localhost", "bash", "-c", code)
    assert chosen.stdout == ("lo\n" if shutil.which("ip") else "\n"), chosen.stderr
    env = {"GLOO_SOCKET_IFNAME": "eth7"}
    assert shell("bash", "launch/on_node.sh", "localhost,localhost", "bash", "-c", code, env=env).stdout == "eth7\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["launch/local.sh", RUN], "usage"),
        (["launch/local.sh", RUN, "two"], "two is not"),
        (["launch/local.sh", "nowhere.yaml", "2"], "nowhere.yaml"),
        (["launch/local.sh", RUN, "2", "--steps"], "--steps"),
        (["launch/local.sh", "--what", RUN, "2"], "usage"),
        (["launch/multinode.sh", RUN], "--hostfile"),
        (["launch/multinode.sh", "--hostfile", "no-hosts", RUN], "no-hosts"),
        (["launch/multinode.sh", "--hostfile", RUN, "--nodes", "2", RUN], "two ways"),
        (["launch/multinode.sh", "--nodes", "2", "--gpus", "x", "--master", "a", RUN], "'x'"),
        (["launch/multinode.sh", "--interface"], "--interface"),
        (["launch/slurm.sbatch", RUN], "sbatch"),
    ],
    ids=lambda value: None if isinstance(value, list) else value,
)
def test_mistakes_get_one_line_and_status_2(tmp_path, words, complaint):
    run = write_run(tmp_path)
    result = shell("bash", *(run if word == RUN else word for word in words), env={"DS_ACCELERATOR": "cpu"})
    assert result.returncode == 2
    assert complaint in result.stderr and len(result.stderr.splitlines()) == 1


def test_local_starts_every_rank_and_hands_on_a_failure(tmp_path, fake_train):
    env = fake_train | {"THEN": "die"}
    result = shell("bash", ROOT / "launch/local.sh", RUN, 2, HOSTILE, env=env, cwd=tmp_path)
    assert result.returncode not in (0, 2), result.stdout + result.stderr
    assert seen(tmp_path) == {str(rank): f"2|{RUN}|{HOSTILE}" for rank in range(2)}
    assert not (tmp_path / "pwned").exists()


def test_stopping_local_stops_every_rank(tmp_path, fake_train):
    env = surroundings({**fake_train, "THEN": "sleep"})
    with open(tmp_path / "log", "w") as log:
        command = ["bash", str(ROOT / "launch/local.sh"), RUN, "2"]
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
    deadline = time.monotonic() + HANGS_S
    while len(seen(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(HANGS_S) == 143, (tmp_path / "log").read_text()
    marked = f"SEEN={fake_train['SEEN']}".encode()
    left = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if marked in environ.read_bytes():
                left.append(environ.parent.name)
    assert left == []
