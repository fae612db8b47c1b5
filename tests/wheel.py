"""A wheel of the package, installed in a folder of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.launcher import HANGS_S, ROOT


def install_wheel(folder: Path) -> Path:
    """The folder with the modules and, below `bin`, the command; for PYTHONPATH and PATH.

    The wheel is built from a copy of the sources, since a build leaves files in them.
    """
    source, site = folder / "source", folder / "site"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("ds_moe", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    _pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source)
    [file] = folder.glob("*.whl")
    _pip("install", "--no-deps", "--no-index", "--target", site, file)
    shutil.rmtree(source)
    return site


def _pip(*words: str | Path) -> None:
    words = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANGS_S)
    assert done.returncode == 0, done.stdout + done.stderr
