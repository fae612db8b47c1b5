"""tools/gpu_check at toy sizes on the CPU: every section ends, and one that fails costs the others nothing."""

import json
import subprocess
import sys

import pytest
import torch

from ds_moe.moe.backends.grouped_mm import GroupedMM
from tests.launcher import HANGS_S, ROOT
from tools.gpu_check import check as command
from tools.gpu_check import layers
from tools.gpu_check.facts import Check

WITHOUT_ENGINES = ["env", "kernels", "exchange", "pieces", "layer"]
WITH_ENGINES = [name for name in command.SECTIONS if name not in WITHOUT_ENGINES]


def said(*words: str) -> tuple[int, list[dict]]:
    line = [sys.executable, "-m", "tools.gpu_check.check", "--toy", *words]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=HANGS_S)
    lines = [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]
    assert lines, done.stderr
    return done.returncode, lines


def test_sections_without_an_engine():
    status, facts = said("--inside", *WITHOUT_ENGINES)
    assert status == 0 and not [fact for fact in facts if fact.get("ok") is False]
    assert {fact["section"] for fact in facts} == set(WITHOUT_ENGINES)
    compared = [fact for fact in facts if fact["fact"] == "experts"]
    assert len(compared) == 2 * len(layers.ROWS) * 2  # dtypes, rows, backends that run on a CPU


@pytest.mark.slow
def test_sections_with_engines_in_processes_of_their_own(tmp_path):
    file = tmp_path / "facts.json"
    status, facts = said(*WITH_ENGINES, "--json", str(file))
    *facts, verdict = facts
    assert status == 0 and verdict["ok"] and verdict["failed"] == [], verdict
    assert [fact["section"] for fact in facts if fact["fact"] == "ended"] == WITH_ENGINES
    assert len([fact for fact in facts if fact["fact"] == "two ranks against transformers"]) == 4
    steps = [fact["loss"] for fact in facts if fact["fact"] == "step"]
    assert steps[:2] == pytest.approx(steps[2:], abs=1e-3)  # ZeRO-2 and ZeRO-3 on the same batches
    assert len(file.read_text().splitlines()) == len(facts) + 1


def test_a_section_that_raises_and_one_that_hangs_cost_the_others_nothing(monkeypatch, capsys):
    def broken(check):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(layers, "exchange", broken)
    assert command.inside(["exchange", "env"], Check(torch.device("cpu"), full=False)) == 1
    facts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "out of memory" in facts[0]["traceback"] and {fact["section"] for fact in facts[1:]} == {"env"}
    lines = []
    command.apart("env", toy=True, limit_s=1.0, lines=lines)  # its imports alone take longer
    last = json.loads(lines[-1])
    assert last["fact"] == "ended" and last["ok"] is False and last["limit_s"] == 1


def test_a_wrong_kernel_is_noticed(monkeypatch, capsys):
    product = GroupedMM.product
    monkeypatch.setattr(GroupedMM, "product", lambda self, rows, *given: product(self, rows, *given) * 1.001)
    check = Check(torch.device("cpu"), full=False)
    layers.kernels(check)
    facts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wrong = {fact["backend"] for fact in facts if fact.get("ok") is False}
    assert wrong == {"grouped_mm"} and check.failed


def test_what_cannot_run_is_one_line(capsys):
    assert command.main(["--toy", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: nothing is no section; choose of env, ")
    if not torch.cuda.is_available():
        assert command.main([]) == 2
        assert "--toy" in capsys.readouterr().err
