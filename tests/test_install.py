"""What a newcomer meets before any training: metadata, imports, the command, make and the launch scripts."""

import importlib.metadata
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner
from deepspeed.launcher.runner import fetch_hostfile

import ds_moe
from tests.launcher import HANGS_S

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["launch/local.sh", "launch/multinode.sh", "launch/slurm.sbatch"]
PARTS = ["launch/on_node.sh", "launch/common.bash"]
RUN = "run file.yaml"  # with a space: quoting must survive every layer
HOSTILE = "train.output_dir=runs/$(touch pwned);`id` 'x'"


def shell(*words, env=None, cwd=ROOT):
    environment = {**os.environ, **(env or {})}
    return subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANGS_S)


def python(code, env=None):
    return shell(sys.executable, "-c", code, env=env)


def modules():
    return sorted(
        name for _, name, _ in pkgutil.walk_packages([str(ROOT / "ds_moe")], "ds_moe.") if "__main__" not in name
    )


# --- the package


def test_version_is_the_same_everywhere():
    assert importlib.metadata.version("ds-moe") == ds_moe.__version__
    assert f"## {ds_moe.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_hold_for_every_requirement():
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    needed = {
        re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9_.-]+", requirement)[0]).lower()
        for requirement in importlib.metadata.requires("ds-moe")
        if 'extra == "triton"' not in requirement
    }
    assert needed <= pinned


def test_every_module_imports_without_triton_megablocks_or_cuda():
    # None in sys.modules makes an import of that name fail, whether it is installed here or not.
    missing = ["triton", "megablocks", "megablocks_ops", "stk", "grouped_gemm", "liger_kernel", "flash_attn"]
    code = f"import importlib, sys\nsys.modules.update(dict.fromkeys({missing}))\n"
    code += f"for name in {modules()}: importlib.import_module(name)"
    result = python(code, env={"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, result.stderr


def test_a_wheel_has_every_deepspeed_json():
    named = re.search(r'package_data=\{"ds_moe": \["([^"]+)"\]\}', (ROOT / "setup.py").read_text())
    assert named is not None
    packaged = {file.name: file.read_text() for file in (ROOT / "ds_moe").glob(named[1])}
    assert packaged == {file.name: file.read_text() for file in (ROOT / "ds_configs").glob("*.json")} != {}


def test_make_lists_its_targets():
    listing = shell("make").stdout
    assert {"demo", "test", "test-all", "lint", "bench"} <= set(re.findall(r"make ([\w-]+)", listing))


# --- shell scripts


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


def write_run(folder):
    """The demo's run file under the name RUN."""
    text = (ROOT / "ds_configs/runs/demo.yaml").read_text()
    (folder / RUN).write_text(text.replace("../", f"{ROOT}/ds_configs/"))
    return folder / RUN


def dry_run(tmp_path, script, *words, env=None):
    """The words of the command that `script` would run; tmp_path holds the run file and is the working directory."""
    write_run(tmp_path)
    result = shell("bash", ROOT / script, "--dry-run", *words, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("+ ")
    return shlex.split(result.stdout)[1:]


def test_local_calls_ds_moe_train(tmp_path):
    words = dry_run(tmp_path, "launch/local.sh", RUN, 2, "moe.ep_size=2", HOSTILE, env={"DS_ACCELERATOR": "cpu"})
    assert words[0] == "env" and words[words.index("--num_accelerators") + 1] == "2"
    assert words[-4:] == ["ds_moe.train", RUN, "moe.ep_size=2", HOSTILE]
    assert not (tmp_path / "pwned").exists()


def test_slurm_gives_cpu_ranks_the_settings_of_ds_moe_train(tmp_path):
    env = {"RANKS_PER_NODE": "2", "SLURM_SUBMIT_DIR": str(ROOT), "OMP_NUM_THREADS": ""}
    words = dry_run(tmp_path, "launch/slurm.sbatch", write_run(tmp_path), env=env)
    settings = words[words.index("env") + 1 : words.index("bash")]
    code = "from ds_moe.launcher import cpu_settings; print(*map('='.join, cpu_settings(2).items()), sep='\\n')"
    # Its ranks find the compiled op by themselves.
    expected = [line for line in python(code, env).stdout.splitlines() if not line.startswith("TORCH_EXTENSIONS_DIR")]
    assert settings == ["LOG_DIR=runs/slurm-0/start_0", *expected] and expected


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


@pytest.fixture
def fake_train(tmp_path):
    """Environment in which `ds_moe.train` is FAKE_TRAIN; each rank leaves a file in tmp_path/seen."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    for folder in ["ds_moe", "seen", "bin"]:
        (tmp_path / folder).mkdir()
    # The rest of the package is the real one.
    (tmp_path / "ds_moe/__init__.py").write_text(f"__version__ = ''\n__path__.append({str(ROOT / 'ds_moe')!r})")
    (tmp_path / "ds_moe/train.py").write_text(FAKE_TRAIN)
    write_run(tmp_path)
    return {
        "VIRTUAL_ENV": sys.prefix,
        "PYTHONPATH": str(tmp_path),
        "SEEN": str(tmp_path / "seen"),
        "THEN": "end",
        "DS_ACCELERATOR": "cpu",
    }


def seen(tmp_path):
    return {file.name: file.read_text() for file in (tmp_path / "seen").iterdir()}


@pytest.mark.slow
def test_slurm_script_starts_one_torchrun_a_node(tmp_path, fake_train):
    for name, text in {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    env = fake_train | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": str(os.getpid()),
        "RANKS_PER_NODE": "1",
    }
    result = shell("bash", ROOT / "launch/slurm.sbatch", RUN, HOSTILE, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert seen(tmp_path) == {str(rank): f"2|{RUN}|{HOSTILE}" for rank in range(2)}
    logs = sorted((tmp_path / f"runs/slurm-{os.getpid()}").glob("start_0/node*/*/attempt_0/0/stdout.log"))
    assert sorted(log.read_text() for log in logs) == ["trained on 0\n", "trained on 1\n"]
    assert not (tmp_path / "pwned").exists()


# Runs until it gets a USR1, as ranks do that write a checkpoint and end.
STOPPABLE_SRUN = """#!/bin/bash
trap 'exit 1' USR1
touch "$SEEN/started"
for _ in {1..6000}; do sleep 0.1; done
"""
NOTING_SCONTROL = """#!/bin/bash
if [[ $1 == requeue ]]; then echo "$2" >"$SEEN/requeued"; else echo localhost; fi
"""


@pytest.mark.parametrize(("number", "requeued", "status"), [("USR1", True, 0), ("TERM", False, 1)])
def test_slurm_script_hands_usr1_on_and_requeues_what_has_stopped(tmp_path, fake_train, number, requeued, status):
    """With a real SLURM: tests/slurm."""
    for name, text in {"srun": STOPPABLE_SRUN, "scontrol": NOTING_SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    env = {
        **os.environ,
        **fake_train,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": "17",
    }
    with open(tmp_path / "log", "w") as log:
        command = ["bash", str(ROOT / "launch/slurm.sbatch"), RUN]
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
    deadline = time.monotonic() + HANGS_S
    while not (tmp_path / "seen/started").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.Signals[f"SIG{number}"])
    assert process.wait(HANGS_S) == status, (tmp_path / "log").read_text()
    assert (tmp_path / "seen/requeued").exists() == requeued


def test_local_starts_every_rank_and_hands_on_a_failure(tmp_path, fake_train):
    env = fake_train | {"THEN": "die"}
    result = shell("bash", ROOT / "launch/local.sh", RUN, 2, HOSTILE, env=env, cwd=tmp_path)
    assert result.returncode not in (0, 2), result.stdout + result.stderr
    assert seen(tmp_path) == {str(rank): f"2|{RUN}|{HOSTILE}" for rank in range(2)}
    assert not (tmp_path / "pwned").exists()


def test_stopping_local_stops_every_rank(tmp_path, fake_train):
    env = {**os.environ, **fake_train, "THEN": "sleep"}
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
