"""README from top to bottom, in an empty folder, with an installed wheel: what it prints runs as it is written.

The hub id of README stands for a tiny model in a cache of the hub, and the data for digits asked about in its words.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_moe.cli import _parser
from tests.launcher import HANGS_S
from tests.wheel import install_wheel

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
# Commands that need a clone or an index of packages. The suite is itself `make test`, tests/demos run `make demo`.
ELSEWHERE = ("make demo", "make test", "pip install torch==", "DS_BUILD_OPS=0 pip install ")
HUB_ID = "Qwen/Qwen3-VL-30B-A3B-Instruct"
COMMIT = "0" * 40


def commands() -> list[str]:
    lines = [line.partition("   #")[0].strip() for kind, body in BLOCKS if kind == "bash" for line in body.splitlines()]
    return [line for line in lines if line]


def test_readme_is_short_and_begins_with_the_two_commands():
    assert len(README.splitlines()) <= 90
    assert commands()[:2] == ["make demo", "make test"]
    assert all(any(line.startswith(one) for line in commands()) for one in ELSEWHERE), "an excuse for no command"


def test_readme_names_every_command():
    [names] = [action.choices for action in _parser()._actions if action.choices]
    assert [name for name in names if f"ds-moe {name}" not in README] == ["completion", "version"]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """An empty folder but for somebody's data, and an environment with the wheel and a cache of the hub."""
    home = tmp_path_factory.mktemp("newcomer")
    site, work = install_wheel(home), home / "work"
    work.mkdir()
    write_data(work / "data")
    write_hub(home / "hub")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = f"{site / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    hub = {"HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"}
    return work, {**environment, **hub, "PATH": path, "PYTHONPATH": str(site), "DS_ACCELERATOR": "cpu"}


def write_data(folder: Path) -> None:
    """README's record with an image that exists, and more about digits: 48 to train on, 12 held out."""
    from ds_moe.data.digits import write_digits

    [record] = [body for kind, body in BLOCKS if kind == "json"]
    for file, count in zip(write_digits(folder), (47, 12), strict=True):
        lines = file.read_text().splitlines(keepends=True)[:count]
        if count == 47:
            [image] = re.findall(r'"image": "([^"]+)"', lines[0])
            lines.append(re.sub(r'"image": "[^"]+"', f'"image": "{image}"', record))
        file.write_text("".join(lines))


def write_hub(cache: Path) -> None:
    from ds_moe.models.presets import build_preset
    from ds_moe.models.processor import save_processor, tiny_processor

    repository = cache / f"models--{HUB_ID.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    build_preset("tiny-vl-moe").save_pretrained(snapshot)
    save_processor(tiny_processor("vl"), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def steps() -> Iterator[tuple[str, str]]:
    """(language, text) of every block that is run, commands one by one."""
    for kind, body in BLOCKS:
        if kind == "python":
            yield kind, body
        elif kind == "bash":
            lines = [line.partition("   #")[0].strip() for line in body.splitlines()]
            yield from ((kind, line) for line in lines if line and not line.startswith(ELSEWHERE))


@pytest.mark.slow
def test_what_readme_prints_runs_in_an_empty_folder_with_an_installed_wheel(newcomer):
    work, environment = newcomer
    for kind, text in steps():
        words = ["bash", "-euo", "pipefail", "-c", text] if kind == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(words, cwd=work, env=environment, capture_output=True, text=True, timeout=HANGS_S)
        assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        print(f"$ {text}\n{done.stdout}")
