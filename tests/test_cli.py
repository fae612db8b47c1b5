"""The `ds-moe` command: instant help, one-line errors, arguments handed on."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_moe import __version__, cli

DEMO = "ds_configs/runs/demo.yaml"
COMMAND = Path(sys.executable).with_name("ds-moe")
LISTED = ["init", "train", "eval", "doctor", "plan", "data", "plot", "export", "assemble", "gate"]
LISTED += ["rollouts", "completion", "version"]


def test_help_is_instant_and_lists_only_what_exists():
    seconds = []
    for _ in range(3):  # the best of three: this measures the command, not the disk cache
        start = time.perf_counter()
        text = subprocess.run([COMMAND, "--help"], check=True, capture_output=True, text=True).stdout
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 5, seconds  # 0.2 on a quiet machine; with torch alone it would be as many on a busy one
    listed = [line.split()[0] for line in text.splitlines() if re.match(r"    \w", line)]
    assert listed == LISTED


def test_no_heavy_library_is_imported_for_what_does_not_need_it():
    script = f"""
import sys
from ds_moe.cli import main
helps = [[name, "--help"] for name in {LISTED}]
runs = [[name, "--dry-run", {DEMO!r}] for name in ("train", "eval")]
for words in (["--help"], *helps, ["version"], *runs):
    try:
        main(words)
    except SystemExit:
        pass
    heavy = {{"torch", "deepspeed", "transformers", "numpy", "datasets"}} & set(sys.modules)
    assert not heavy, (words, heavy)
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_a_user_error_is_one_line_and_code_2(capsys):
    assert cli.main(["train", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "error: nowhere.yaml: cannot read the run file (No such file or directory)\n"


def test_train_refuses_a_bad_run_before_launching(capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("launched"))
    assert cli.main(["train", DEMO, "moe.ep_sise=4"]) == 2
    assert "did you mean moe.ep_size?" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "said"), [("train", ["train", "eval"]), ("eval", ["eval"])])
def test_data_files_that_are_not_there_are_said_before_launching(command, said, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("launched"))
    assert cli.main([command, DEMO, "data.train=no/train.jsonl", "data.eval=no/eval.jsonl"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r"data\.(\w+) no/(\w+)\.jsonl does not exist", line).groups() for line in lines] == [
        (key, key) for key in said
    ]


def test_every_form_of_a_source_reaches_the_ranks(tmp_path, monkeypatch):
    """A list, a section, a pattern with braces, a folder, the bundled scans and a dataset of the hub."""
    launched = []
    monkeypatch.setattr("ds_moe.launcher.processes.start", lambda launch, _: launched.append(launch) or 0)
    for name in ("a0", "a1", "b"):
        (tmp_path / f"{name}.jsonl").write_text("")
    forms = ["a*.jsonl", "a{0..1}.jsonl", "b.jsonl", "", "[a]0.jsonl"]
    sources = [*(f"{tmp_path}/{form}" for form in forms), "digits", "hub:some/chats"]
    listed = [*(f"data.train={{path: '{source}'}}" for source in sources), *(f"data.train='{s}'" for s in sources)]
    listed.append(
        "data.train=[" + ", ".join(f"{{path: '{s}', weight: 2, name: n{i}}}" for i, s in enumerate(sources)) + "]"
    )
    for one in listed:
        assert cli.main(["train", DEMO, one]) == 0, one
    assert len(launched) == len(listed)
    assert cli.main(["eval", DEMO, f"data.eval=['{tmp_path}/a*.jsonl', digits]"]) == 0


def test_of_a_list_each_source_without_files_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("launched"))
    (tmp_path / "a.jsonl").write_text("")
    given = f"data.train=[{tmp_path}/a.jsonl, no.jsonl, '{tmp_path}/b*.jsonl']"
    assert cli.main(["train", DEMO, given, "data.eval=digits"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "data.train no.jsonl does not exist (give" in first
    assert f"data.train {tmp_path}/b*.jsonl matches no file (correct the pattern)" in second


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["train", DEMO, "--nprocs", "2"], "unrecognized arguments: --nprocs 2"),
        (["train", DEMO, "--nprocs", "2"], "--nprocs 2 (ds-moe --help shows the usage)"),
        *(
            (
                ["train", DEMO, *words],
                f"{' '.join(words)}; keys of the run file are given as train.lr=1e-4, without dashes",
            )
            for words in (["--learning_rate", "1e-5"], ["--bf16"], ["--train.lr=1"], ["--lr", "1"], ["--lora-rank=8"])
        ),
        (["export", "a", "b", "--seed", "1"], "--seed 1 (ds-moe --help shows the usage)"),
        (["train", DEMO, "--nproc", "two"], "two is not a whole number above 0"),
        (
            ["doctor", DEMO, "--device-memory", "80XB"],
            "argument --device-memory: 80XB is no size of memory; write it as",
        ),
        (["doctor", DEMO, "x=1", "--world", "2", "stray"], "unrecognized arguments: stray"),
        (["version", "a=1"], "unrecognized arguments: a=1"),
        (["export", "a", "b", "--layout", "other"], "invalid choice: 'other'"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line(words, complaint, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert said.startswith("error: ") and complaint in said and said.count("\n") == 1


def test_python_m_is_the_same_command():
    said = {}
    for command in ([COMMAND], [sys.executable, "-m", "ds_moe"]):
        result = subprocess.run([*command, "version", "a=1"], capture_output=True, text=True)
        said[result.returncode, result.stdout, result.stderr] = command
    assert list(said) == [(2, "", "error: unrecognized arguments: a=1 (ds-moe --help shows the usage)\n")]


def test_version(capsys):
    assert cli.main(["version"]) == 0
    assert f"ds_moe {__version__}\n" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "layout"), [([], None), (["--layout", "memory"], "memory")])
def test_export_says_in_one_line_what_was_written(words, layout, monkeypatch, capsys):
    from ds_moe.export import model as export

    seen = []

    def export_checkpoint(*arguments):
        seen.append(arguments)
        return export.Exported(Path("out"), "memory", ["a.safetensors", "b.safetensors"], 1_234_567, 4_938_268)

    monkeypatch.setattr(export, "export_checkpoint", export_checkpoint)
    assert cli.main(["export", "runs/a", "out", *words]) == 0
    assert seen == [(Path("runs/a"), Path("out"), layout)]
    said = capsys.readouterr().out
    assert said == "out: 1,234,567 parameters, 0.00494 GB in 2 file(s), experts in the memory layout\n"


# --- completion


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """Of bash, in a folder with files whose names begin with `my_`."""
    folder = tmp_path_factory.mktemp("completion")
    for name in ("my_run.yaml", "my_hosts"):
        (folder / name).touch()
    (folder / "my_runs").mkdir()
    text = subprocess.run([COMMAND, "completion", "bash"], check=True, capture_output=True, text=True).stdout
    (folder / "script").write_text(text)
    return folder / "script"


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("tra", {"train"}),
        ("train my_", {"my_run.yaml", "my_hosts", "my_runs"}),
        ("train my_run.yaml --host", {"--hostfile"}),
        ("train my_run.yaml --hostfile my_h", {"my_hosts"}),
        ("train my_run.yaml --nproc my_", set()),
        ("plot my_runs my_r", {"my_run.yaml", "my_runs"}),
        ("gate ev", {"eval"}),
        ("gate predict my_run.yaml --requests my_h", {"my_hosts"}),
        ("export --layout ", {"hub", "memory"}),
        ("completion z", {"zsh"}),
    ],
)
def test_bash_completes_commands_options_choices_and_files(line, completed, script):
    words = ["ds-moe", *line.split(" ")]
    lines = f"source ./script; COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}"
    lines += '; _shtab_ds_moe; printf "%s\\n" "${COMPREPLY[@]}"'
    result = subprocess.run(["bash", "-c", lines], cwd=script.parent, capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) == completed


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script_too(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    assert {"train", "hostfile", "export"} <= set(re.findall(r"\w+", capsys.readouterr().out))


def test_files_are_completed_where_a_file_is_named_and_nowhere_else():
    named = {argument.metavar for argument in cli.all_arguments(cli._parser()) if cli.names_file(argument)}
    assert "RUN.yaml" in named
    assert not [name for name in named if not re.search(r"FILE|FOLDER|RUN|OUT|CKPT|MODEL|SPEC|DATA|REQUESTS", name)]
