"""The doctor imports the rewards of a run, and calls none."""

import pytest

from ds_moe.config.run import RunConfig
from ds_moe.doctor.case import Case, Device, Finding
from ds_moe.doctor.engine import check_engine

CODE = "{}\ndef score(completion, answer, record):\n    raise AssertionError('called')\n"


def findings(reward):
    rl = {"engine": {"kind": "local", "prompts": 4, "max_new_tokens": 8}, "reward": reward}
    config = RunConfig(task="rl", model={"preset": "tiny-moe"}, data={"train": "digits"}, rl=rl, deepspeed="zero3")
    return list(check_engine(Case(config, 1, Device(True, 1e9, ""), samples=0)))[1:]


def test_a_function_is_imported_and_not_called(tmp_path):
    (tmp_path / "fine.py").write_text(CODE.format(""))
    [line] = findings({"function": f"{tmp_path}/fine.py:score"})
    assert line.level == "ok" and line.text.startswith(f"reward score is {tmp_path}/fine.py:score, sha256 ")
    assert findings({}) == [Finding("ok", "reward exact")]


@pytest.mark.parametrize("import_, reason", [("import gone", "No module named 'gone'"), ("exit(3)", "SystemExit: 3")])
def test_what_cannot_be_imported_is_an_error(tmp_path, import_, reason):
    (tmp_path / "bad.py").write_text(CODE.format(import_))
    [line] = findings({"function": f"{tmp_path}/bad.py:score"})
    assert line.level == "error" and reason in line.text and "\n" not in line.text
