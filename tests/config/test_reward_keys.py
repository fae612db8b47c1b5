"""`rl.reward` in run files: where functions are looked for, and what a run would not use."""

from pathlib import Path

import pytest

from ds_moe.config.run_file import load_run, parse_run
from ds_moe.errors import UserError

RUN = """\
task: rl
model:
  preset: tiny-vl-moe
data:
  train: digits
rl:
  engine:
    kind: local
    prompts: 4
    max_new_tokens: 8
train:
  steps: 4
deepspeed: zero3
"""
CODE = "def score(completion, answer, record):\n    return 1\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with runs/run.yaml, files of rewards beside it and here."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/run.yaml").write_text(RUN)
    (tmp_path / "runs/beside.py").write_text(CODE)
    (tmp_path / "below").mkdir()
    (tmp_path / "below/here.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complaints(*overrides):
    return parse_run("runs/run.yaml", list(overrides))[1]


def test_files_are_found_beside_the_run_file_or_below_the_working_directory(folder, monkeypatch):
    def function(given):
        return load_run("runs/run.yaml", [f"rl.reward.function={given}"]).rl.reward.function

    assert function("beside.py:score") == "runs/beside.py:score"
    assert function("below/here.py:score") == "below/here.py:score"
    assert function("../below/here.py:score") == "below/here.py:score"
    assert function("package.module:score") == "package.module:score" and function("contains") == "contains"
    with pytest.raises(UserError) as raised:
        function("nowhere.py:score")
    text = "'nowhere.py' is neither a file beside the run file nor below the working directory"
    assert str(raised.value) == f"override rl.reward.function=nowhere.py:score: rl.reward.function: {text} {folder}"
    odd = folder / "a:b"
    odd.mkdir()
    Path("runs/beside.py").rename(odd / "c d.py")
    monkeypatch.chdir(folder / "runs")
    found = load_run(folder / "runs/run.yaml", [f"rl.reward.function={odd}/c d.py:score"])
    assert found.rl.reward.function == f"{odd}/c d.py:score"


def test_files_of_several_functions_are_found_too(folder):
    functions = "[{function: exact}, {function: 'beside.py:score', weight: 0.5}, {function: 'gone.py:other'}]"
    config, [line] = parse_run("runs/run.yaml", [f"rl.reward.functions={functions}"])
    assert line.endswith(f"'gone.py' is neither a file beside the run file nor below the working directory {folder}")
    assert config is not None
    assert [one.function for one in config.rl.reward.all] == ["exact", "runs/beside.py:score", "gone.py:other"]


@pytest.mark.parametrize(
    "overrides, text",
    [
        (["rl.reward.function=score"], 'must be one of exact, contains, "file.py:name" or "package.module:name"'),
        (["rl.reward.function=my.py"], 'must be one of exact, contains, "file.py:name" or "package.module:name"'),
        (["rl.reward.timeout_s=5.0"], "rl.reward.timeout_s would not be used: the rewards are built in"),
        (["rl.reward.max_failed=0.1"], "rl.reward.max_failed would not be used: the rewards are built in"),
        (["rl.reward.overlong_penalty=2.0"], "would not be used: rl.reward.overlong_buffer is not set"),
        (["rl.reward.overlong_buffer=9"], "rl.reward.overlong_buffer 9 is longer than rl.engine.max_new_tokens 8"),
        (["rl.reward.function=exact", "rl.reward.functions=[{function: contains}]"], "rl.reward.functions lists them"),
        (["rl.reward.functions=[{function: exact}, {function: exact}]"], "the name exact stands there twice"),
        (["rl.reward.functions=[{function: exact, name: overlong}]"], "what the penalty for length is called"),
        (["rl.reward.functions=[{function: exact, name: 'a b'}]"], "rl.reward.functions.0.name is 'a b'"),
    ],
)
def test_what_a_run_would_not_use_or_cannot_be(folder, overrides, text):
    [line] = complaints(*overrides)
    assert text in line and line.startswith("override rl.reward")


def test_a_function_of_ones_own_uses_every_key(folder):
    keys = [
        "timeout_s=5.0",
        "processes=1",
        "memory_gb=1.0",
        "max_failed=0.1",
        "overlong_buffer=8",
        "overlong_penalty=1.0",
    ]
    assert not complaints("rl.reward.function=beside.py:score", *(f"rl.reward.{key}" for key in keys))


def test_rewards_without_an_engine_are_those_of_the_file(folder):
    [line] = complaints("rl.engine=null", "rl.reward.function=contains", "data.train=a.jsonl")
    text = "rl.reward would not be used: there is no rl.engine, and the records of data.train bring their rewards"
    assert line.endswith(f"{text}; remove it")
