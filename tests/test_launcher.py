"""`ds-moe train`: the command it makes, and that no rank outlives it."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner

from ds_moe import cli, train
from ds_moe.config import check
from ds_moe.engine.cpu import OP, cpu_settings
from ds_moe.errors import UserError
from ds_moe.launcher import command, processes
from tests.launcher import HANGS_S, run_ranks

DEMO = "ds_configs/runs/demo.yaml"
HOSTILE = "train.output_dir=runs/$(touch pwned);`id` 'x'"
TAIL = ["--quiet", "--no_local_rank", "--module", "ds_moe.train", DEMO]


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    for name in ("MASTER_PORT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", *cpu_settings(1)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def dry_run(capsys, *words):
    """(settings, launcher's words) that `ds-moe train --dry-run` prints."""
    assert cli.main(["train", "--dry-run", *map(str, words)]) == 0
    printed = shlex.split(capsys.readouterr().out)
    assert printed.pop(0) == "+"
    start = next(i for i, word in enumerate(printed) if word.endswith("/deepspeed"))
    assert printed[:start][:1] in ([], ["env"])
    return dict(word.split("=", 1) for word in printed[1:start]), printed[start + 1 :]


# --- a run file with mistakes, without `ds-moe train` in front of its ranks


@pytest.fixture
def mistaken(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {preset: tiny-vl-moe}\ndata: {train: digits}\ndeepspeed: zero3\nbf16: true\nsave_steps: 5\n"
    )
    return path


def test_the_first_rank_of_a_host_says_what_is_wrong_and_the_others_wait(mistaken, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(train.time, "sleep", waited.append)
    for local_rank, waits in (("0", []), ("1", [train.SAID_WITHIN_S])):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert train.main([str(mistaken)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert (len(lines), waited) == (0 if waits else 2, waits)
        assert all(line.startswith(f"error: {mistaken}:") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_each_complaint_is_printed_once_under_either_launcher(mistaken, launcher):
    run = run_ranks("ds_moe.train", 2, [mistaken], launcher=launcher, check=False)
    assert run.returncode != 0
    assert [run.output.count(f"unknown key {key}") for key in ("bf16", "save_steps")] == [1, 1]


# --- the command


def test_cpu_ranks_share_the_cores_and_find_the_compiled_op(capsys):
    settings, words = dry_run(capsys, DEMO, "--nproc", 2, "--port", 12345, "moe.ep_size=2", HOSTILE)
    assert words == ["--num_accelerators", "2", "--master_port", "12345", *TAIL, "moe.ep_size=2", HOSTILE]
    assert settings == {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2)),
        "MALLOC_MMAP_THRESHOLD_": "4294967296",
        "MALLOC_TRIM_THRESHOLD_": "34359738368",
        "TORCH_EXTENSIONS_DIR": f"{sys.prefix}/torch_extensions",
    }


def test_what_does_not_fit_the_number_of_ranks_is_said_before_one_starts(monkeypatch, capsys):
    monkeypatch.setattr(processes, "start", lambda *_: pytest.fail("started"))
    assert cli.main(["train", DEMO, "--nproc", "3"]) == 2
    batch, experts = capsys.readouterr().err.splitlines()
    assert batch.startswith(f"error: {DEMO}:") and "is not a multiple of micro_batch_size 32 x 3 ranks = 96" in batch
    assert experts.endswith("moe.ep_size 2 does not divide the 3 ranks (1 does, and the model's 8 experts)")


@pytest.mark.parametrize(
    ("accelerator", "why"), [("cpu", "needs an accelerator; use sdpa"), ("cuda", "flash_attn is not installed")]
)
def test_kernels_of_attention_that_are_not_here_are_one_line_before_a_rank_starts(
    accelerator, why, monkeypatch, capsys
):
    monkeypatch.setattr(processes, "start", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    for words in (["train", "--nproc", "1"], ["eval"]):
        assert cli.main([*words, DEMO, "model.attention=flash_attention_2", "train.precision=bf16"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "model.attention=flash_attention_2: model.attention flash_attention_2" in line and why in line


def test_what_the_user_has_set_stays(capsys, monkeypatch):
    chosen = {"OMP_NUM_THREADS": "7", "MALLOC_TRIM_THRESHOLD_": "1", "TORCH_EXTENSIONS_DIR": "/some/where"}
    for name, value in {**chosen, "MASTER_PORT": "4000"}.items():
        monkeypatch.setenv(name, value)
    settings, words = dry_run(capsys, DEMO)
    assert settings.items() >= chosen.items()
    assert words == ["--num_accelerators", "1", "--master_port", "4000", *TAIL]
    monkeypatch.setenv("MASTER_PORT", "any")
    with pytest.raises(UserError, match="MASTER_PORT=any is not a port number"):
        command.plan(DEMO, [])


def test_every_run_has_a_port_of_its_own(capsys):
    ports = {dry_run(capsys, DEMO)[1][3] for _ in range(2)}
    assert len(ports) == 2 and all(1024 < int(port) < 65536 for port in ports)


@pytest.mark.parametrize(
    "words",
    [
        [DEMO, "train.seed=3", "train.lr=1", "--nproc", 2],
        [DEMO, "--nproc", 2, "train.seed=3", "train.lr=1"],
        ["--nproc", 2, DEMO, "train.seed=3", "train.lr=1"],
        [DEMO, "train.seed=3", "--nproc", 2, "train.lr=1"],
    ],
)
def test_overrides_may_stand_anywhere(words, capsys):
    assert dry_run(capsys, *words)[1][4:] == [*TAIL, "train.seed=3", "train.lr=1"]


def test_the_machines_of_a_hostfile_get_no_settings_of_this_one(capsys, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=8\nb slots=8\n")
    assert dry_run(capsys, DEMO, "--hostfile", hosts) == ({}, ["--hostfile", str(hosts), *TAIL])
    words = dry_run(capsys, DEMO, "--hostfile", hosts, "--nproc", 4, "--port", 29501)[1]
    assert words[2:6] == ["--num_accelerators", "4", "--master_port", "29501"]
    with pytest.raises(UserError, match="--hostfile none: no such file"):
        command.plan(DEMO, [], hostfile="none")


@pytest.mark.parametrize(
    ("nproc", "visible", "settings", "words"),
    [
        (None, "", {}, []),
        (2, "", {}, ["--num_accelerators", "2"]),
        (2, "4,5,7", {"CUDA_VISIBLE_DEVICES": "4,5"}, []),
        (None, "4,5,7", {"CUDA_VISIBLE_DEVICES": "4,5,7"}, []),
    ],
)
def test_accelerators_are_chosen_by_number_or_by_cuda_visible_devices(nproc, visible, settings, words):
    assert command.choose_devices(nproc, 3, visible) == (settings, words)


def test_impossible_choices_of_accelerators_are_refused():
    with pytest.raises(UserError, match=r"--nproc 4: only 3 accelerator\(s\) visible here; DS_ACCELERATOR=cpu"):
        command.choose_devices(4, 3, "")
    with pytest.raises(UserError, match="only 0 accelerator"):
        command.choose_devices(None, 0, "")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=GPU-8a: .* device numbers only"):
        command.choose_devices(1, 1, "GPU-8a")


def test_a_single_host_is_this_machine_only_if_it_is_named_so(capsys, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text(
        "192.0.2.7 slots=2\n"
    )  # DeepSpeed alone would train here, with the words as another shell sees them
    far = ["--hostfile", str(hosts), "--force_multi", *TAIL, command.for_remote_shell(HOSTILE)]
    assert dry_run(capsys, DEMO, "--hostfile", hosts, HOSTILE) == ({}, far)
    hosts.write_text("localhost slots=2\n")
    assert dry_run(capsys, DEMO, "--hostfile", hosts, HOSTILE) == ({}, ["--hostfile", str(hosts), *TAIL, HOSTILE])


def pdsh_makes(line):
    """What pdsh sends to the shell of a host."""
    return re.sub("%([%hnu])", lambda found: {"%": "%", "h": "node", "n": "0", "u": "me"}[found[1]], line)


@pytest.mark.parametrize(
    "word",
    ["train.lr=1e-3", "a=$(touch fired)", "a=`id`;ls", 'b="two words"', "c='x y' $HOME", "d=*", "e=%h %n", "100%"],
)
def test_the_shell_of_another_machine_sees_the_words_as_they_were_written(word, tmp_path):
    quoted = command.for_remote_shell(word)
    runner = PDSHRunner(SimpleNamespace(user_args=[quoted], user_script=""), "")
    [line] = runner.user_arguments
    seen = subprocess.run(["bash", "-c", f"printf %s {pdsh_makes(line)}"], capture_output=True, text=True, cwd=tmp_path)
    assert seen.stdout == word and not list(tmp_path.iterdir())


# --- the processes

RUN_GROUP = """
import os, sys
from ds_moe.launcher import processes
processes.GRACE_S = float(sys.argv[1])
sys.exit(processes.run_group([sys.executable, "-c", sys.argv[2]], dict(os.environ)))
"""
# Dies of a signal at once, unlike its rank, which says when it is up.
LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", '''
import signal, sys, time
def on_term(*_):
    time.sleep({needs})
    sys.exit()
signal.signal(signal.SIGTERM, on_term)
print("rank is up", flush=True)
time.sleep(600)
''']).wait()
"""


@pytest.fixture
def group():
    """`group(grace, needs)`: a `run_group` and, below it, a launcher and a rank that needs `needs` seconds to end."""
    started = []

    def start(grace, needs, before=("env", "--default-signal=INT,HUP,TERM")):  # whatever this run of tests ignores
        words = [*before, sys.executable, "-c", RUN_GROUP, str(grace), LAUNCHER.format(needs=needs)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "rank is up\n"
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 2
        started.extend(children)
        return process, children

    yield start
    for process in started:
        if isinstance(process, subprocess.Popen):
            process.stdout.close()
        elif process.is_running():
            process.kill()


def running(processes):
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", processes.STOPPING)
def test_a_signal_ends_every_rank_before_the_command_ends(group, number):
    process, ranks = group(grace=600, needs=0.5)
    process.send_signal(number)
    assert process.wait(timeout=HANGS_S) == 128 + number
    assert not running(ranks)


def test_a_rank_that_will_not_end_is_killed(group):
    process, ranks = group(grace=0.5, needs=600)
    process.terminate()
    assert process.wait(timeout=HANGS_S) == 128 + signal.SIGTERM
    assert not running(ranks)


def test_a_rank_does_not_outlive_a_killed_launcher(group):
    process, ranks = group(grace=600, needs=0)
    ranks[0].kill()
    assert process.wait(timeout=HANGS_S) == 128 + signal.SIGKILL
    assert not running(ranks)


def test_nohup_is_respected(group):
    process, ranks = group(600, 0, before=["env", "--ignore-signal=HUP"])
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None and len(running(ranks)) == 2
    process.terminate()
    assert process.wait(timeout=HANGS_S) == 128 + signal.SIGTERM


ASKED = """
import os, sys
from ds_moe.launcher import processes
processes.GRACE_S = 1.0
sys.exit(processes.run_group([sys.executable, "-c", sys.argv[1]], dict(os.environ), float(sys.argv[2])))
"""
# As DeepSpeed's: it knows its rank's code, and would end at once of a signal to itself.
PATIENT_LAUNCHER = """
import os, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", '''
import signal, sys, time
def on_term(*_):
    time.sleep({needs})
    print("rank has saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, on_term)
print("rank is up", flush=True)
time.sleep(600)
'''], env={{**os.environ, "RANK": "0"}})
code = rank.wait()
print("launcher saw", code, flush=True)
sys.exit(code)
"""


def asked(needs, stop_within_s, *signals):
    """The output of a job that gets signals, half a second apart, and its code."""
    words = ["env", "--default-signal=INT,HUP,TERM", sys.executable, "-c", ASKED]
    words += [PATIENT_LAUNCHER.format(needs=needs), str(stop_within_s)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "rank is up\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(0.5)
    output, _ = process.communicate(timeout=HANGS_S)
    return output, process.returncode


@pytest.mark.parametrize("number", processes.STOPPING)
def test_ranks_have_time_to_save_and_the_launcher_hears_of_it_from_them(number):
    assert asked(1.0, 600.0, number) == ("rank has saved\nlauncher saw 143\n", 128 + number)


def test_a_second_signal_does_not_wait_for_a_checkpoint():
    output, code = asked(600.0, 600.0, signal.SIGINT, signal.SIGINT)
    assert (output, code) == ("", 128 + signal.SIGINT)


def test_past_the_deadline_nothing_is_waited_for():
    output, code = asked(600.0, 0.1, signal.SIGTERM)
    assert (output, code) == ("", 128 + signal.SIGTERM)


@pytest.mark.parametrize(
    ("codes", "restarts", "starts"),
    [
        ([1, 247, 0], 5, 3),  # crashed, killed, complete
        ([1, 1, 1, 1], 2, 3),
        ([1, 1], 0, 1),
        ([2, 0], 5, 1),  # wrong as it is written
        ([143, 0], 5, 1),  # stopped by a signal
        ([3, 0], 5, 2),  # by the watchdog
    ],
)
def test_a_crashed_run_is_started_again(codes, restarts, starts, monkeypatch, capsys):
    given = iter(codes)
    seen = []
    monkeypatch.setattr(command, "plan", lambda *arguments: "plan")
    monkeypatch.setattr(processes, "start", lambda plan, stop_within_s: seen.append(stop_within_s) or next(given))
    code = cli.main(["train", DEMO, "--max-restarts", str(restarts)])
    assert (len(seen), code) == (starts, codes[starts - 1])
    assert set(seen) == {120.0}  # train.stop_within_s
    assert capsys.readouterr().err.count("starting again") == starts - 1


def test_the_launchers_exit_code_is_passed_on():
    assert processes.run_group([sys.executable, "-c", "import sys; sys.exit(7)"], dict(os.environ)) == 7


def test_nothing_is_launched_where_the_op_cannot_be_built(tmp_path):
    environment = {**os.environ, "CXX": "g++-nowhere", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    words = [Path(sys.executable).with_name("ds-moe"), "train", DEMO]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=HANGS_S)
    assert result.returncode == 2
    assert result.stdout.startswith("+ env ") and len(result.stdout.splitlines()) == 1
    assert result.stderr.startswith("error: no C++ compiler: `g++-nowhere`") and result.stderr.count("\n") == 1
    assert not (tmp_path / OP).exists()
