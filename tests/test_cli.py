"""The `ds-moe` command: instant help, one-line errors, and a launcher that leaves no rank behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ds_moe import __version__, cli
from ds_moe.errors import UserError

DEMO = "ds_configs/runs/demo.yaml"
RUN_IN_GROUP = """
import os, sys
from ds_moe.cli import _run_in_group
sys.exit(_run_in_group([sys.executable, "-c", sys.argv[1]], dict(os.environ)))
"""
# A launcher that dies of the signal at once, and whose rank needs a second to end.
LAUNCHER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", '''
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit(0)))
print("rank is up", flush=True)
time.sleep(600)
'''])
rank.wait()
"""


def test_help_is_instant_and_lists_only_what_exists():
    command = [sys.executable, "-m", "ds_moe.cli", "--help"]
    best = 10.0
    for _ in range(3):
        start = time.perf_counter()
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        best = min(best, time.perf_counter() - start)
    assert best < 1
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("    ")]
    assert listed == ["train", "doctor", "export", "version"]


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["version"]])
def test_no_heavy_library_is_imported_for_it(command):
    script = """
import sys
from ds_moe.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
heavy = {"torch", "deepspeed", "transformers", "numpy", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script, *command], check=True, capture_output=True)


def test_a_user_error_is_one_line_and_code_2(capsys):
    assert cli.main(["train", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "error: nowhere.yaml: cannot read the run file (No such file or directory)\n"


def test_train_refuses_a_bad_run_before_launching(capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("launched"))
    assert cli.main(["train", DEMO, "moe.ep_sise=4"]) == 2
    assert "did you mean moe.ep_size?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["train", DEMO, "train.seed=3", "train.lr=1", "--nproc", "2"],
        ["train", DEMO, "--nproc", "2", "train.seed=3", "train.lr=1"],
        ["train", "--nproc", "2", DEMO, "train.seed=3", "train.lr=1"],
        ["train", DEMO, "train.seed=3", "--nproc", "2", "train.lr=1"],
    ],
)
def test_overrides_may_stand_anywhere_and_no_shell_sees_them(words, monkeypatch):
    launched = {}
    monkeypatch.setattr(cli, "_run_in_group", lambda command, env: launched.update(command=command, env=env) or 0)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert cli.main(words) == 0
    command = launched["command"]
    assert Path(command[0]).name == "deepspeed"
    assert command[3:] == [
        *("--num_accelerators", "2", "--quiet", "--no_local_rank", "--module", "ds_moe.train"),
        *(DEMO, "train.seed=3", "train.lr=1"),
    ]
    assert launched["env"]["DS_ACCELERATOR"] == "cpu" and int(launched["env"]["OMP_NUM_THREADS"]) >= 1


def test_stray_words_are_refused(capsys):
    for words in (
        ["train", DEMO, "--nprocs", "2"],
        ["doctor", DEMO, "x=1", "--world", "2", "stray"],
        ["version", "a=1"],
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(words)
        assert left.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_launch_commands(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=8\nb slots=8\n")
    multi = cli.launch_command("r.yaml", [], None, str(hosts), 29501, on_cpu=False)
    assert multi[1:5] == ["--hostfile", str(hosts), "--master_port", "29501"] and "--num_accelerators" not in multi
    everything = cli.launch_command("r.yaml", [], None, None, None, on_cpu=False)
    assert "--num_accelerators" not in everything and "--master_port" in everything
    alone = cli.launch_command("r.yaml", [], None, None, 4000, on_cpu=True)
    assert alone[1:5] == ["--master_port", "4000", "--num_accelerators", "1"]
    with pytest.raises(UserError, match="--hostfile none: no such file"):
        cli.launch_command("r.yaml", [], None, "none", None, on_cpu=True)


def test_the_launchers_exit_code_is_passed_on():
    for script, code in (("import sys; sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)):
        assert cli._run_in_group([sys.executable, "-c", script], dict(os.environ)) == code


def test_a_signal_ends_every_rank_before_the_command_ends():
    command = [sys.executable, "-c", RUN_IN_GROUP, LAUNCHER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "rank is up\n"
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert len(ranks) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]


def test_version(capsys):
    assert cli.main(["version"]) == 0
    assert f"ds_moe {__version__}\n" in capsys.readouterr().out


def test_export_passes_its_arguments_on(monkeypatch):
    import ds_moe.export

    seen = []
    monkeypatch.setattr(ds_moe.export, "export_checkpoint", lambda *arguments: seen.append(arguments))
    assert cli.main(["export", "runs/a", "out", "--layout", "memory"]) == 0
    assert seen == [(Path("runs/a"), Path("out"), "memory")]
