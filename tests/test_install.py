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
from tests.wheel import install_wheel

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A folder with what a wheel installs."""
    return install_wheel(tmp_path_factory.mktemp("wheel"))


def test_a_wheel_has_every_module_json_and_run_file(wheel):
    def files(folder: Path, *patterns: str) -> dict[str, str]:
        found = [file for pattern in patterns for file in folder.glob(pattern)]
        return {file.relative_to(folder).as_posix(): file.read_text() for file in found}

    assert files(wheel / "ds_moe", "**/*.py") == files(ROOT / "ds_moe", "**/*.py") != {}
    shipped = files(wheel / "ds_moe/ds_configs", "*.*", "*/*")
    assert shipped == files(ROOT / "ds_configs", "*.*", "*/*") and len(shipped) > 10


def test_an_installed_wheel_suffices(wheel, tmp_path):
    """Run files that name a shipped JSON, and the shipped run files, are read in a folder without any file of ours."""
    (tmp_path / "run.yaml").write_text(
        "model: {preset: tiny-vl-moe}\ndata: {train: digits}\ntrain: {steps: 1}\ndeepspeed: zero3_offload\n"
    )
    script = f"""
import ds_moe
from pathlib import Path
from ds_moe.config.deepspeed import resolve_deepspeed
from ds_moe.config.run_file import load_run
assert ds_moe.__path__ == [{str(wheel / "ds_moe")!r}], ds_moe.__path__
assert "offload_optimizer" in resolve_deepspeed(load_run("run.yaml"), 2, True)["zero_optimization"]
runs = sorted(Path(ds_moe.__path__[0], "ds_configs/runs").iterdir())
for run in runs:
    assert not Path(load_run(run).deepspeed).is_absolute()
print(*(run.name for run in runs))
"""
    result = shell(sys.executable, "-c", script, env={"PYTHONPATH": str(wheel)}, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == sorted(file.name for file in (ROOT / "ds_configs/runs").glob("*.yaml"))


def test_make_lists_its_targets():
    listing = shell("make").stdout
    assert {"demo", "test", "test-all", "lint", "bench"} <= set(re.findall(r"make ([\w-]+)", listing))
