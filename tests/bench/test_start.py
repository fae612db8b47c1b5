"""Every command of tools can be started as a module and says what it does."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in sorted((ROOT / "tools").rglob("*.py"))
    if "command_line(__doc__" in file.read_text()
]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # other tests have imported it
@pytest.mark.parametrize("module", COMMANDS)
def test_help(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert "usage: " in capsys.readouterr().out


def test_every_benchmark_is_found():
    benches = {f"tools.bench.{folder.parent.name}.bench" for folder in (ROOT / "tools/bench").glob("*/bench.py")}
    assert benches <= set(COMMANDS) and len(benches) >= 7
