"""What a newcomer meets before any training: metadata, imports, the command and make."""

import importlib.metadata
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ds_moe
from tests.launcher import HANGS_S

ROOT = Path(__file__).resolve().parents[1]


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


@pytest.mark.slow
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
