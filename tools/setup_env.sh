#!/usr/bin/env bash
# Make the project's virtual environment: tools/setup_env.sh   (called by make; safe to run again)
#   VENV      folder of the environment (default: .venv). An environment that already holds a torch in the supported
#             range keeps it, so that you can install the build for your CUDA first.
#   PYTHON    interpreter to make it with (default: the first of python3.11, 3.12, 3.13, python3 that is >= 3.11)
# On a machine without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves torch's CUDA libraries.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}

say() { printf '[setup %3ds] %s\n' "$SECONDS" "$1"; }
die() { printf 'setup_env: %s\n' "$1" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
        # A pyenv shim may be on PATH for a version that is not there: only running it tells.
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python >= 3.11 with venv found (Debian/Ubuntu: apt-get install python3.11-venv), or set PYTHON=/path/to/python"
}

if [[ ! -x $venv/bin/python ]]; then
    python=$(find_python)
    say "creating $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
venv=$(cd "$venv" && pwd)
python=$venv/bin/python
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$venv has $("$python" --version); 3.11 or newer is needed"
export PATH="$venv/bin:$PATH"

# A torch that is there already is the user's choice of build: its version is then not pinned.
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
grep -v '^torch==' constraints.txt > "$constraints"
# pip's notes on index pages that do not exist are noise on machines with a local mirror; errors stay.
pip() { "$python" -m pip install --quiet --disable-pip-version-check -c "$constraints" "$@" 2> >(grep -v '^WARNING: Location' >&2); }

if ! "$python" -c 'import torch, sys; v = tuple(map(int, torch.__version__.split(".")[:2])); sys.exit(not (2, 11) <= v < (2, 14))' 2>/dev/null; then
    cp constraints.txt "$constraints"
    say "installing torch (the largest download)"
    pip torch numpy  # torch warns at every import where there is no numpy
fi
say "torch $("$python" -c 'import torch; print(torch.__version__)'); installing build tools and DeepSpeed"
pip setuptools wheel ninja packaging psutil
# DeepSpeed is a source package whose setup imports torch (hence no isolation); its ops are compiled when first used.
DS_BUILD_OPS=0 pip --no-build-isolation deepspeed
say "installing ds_moe and its dependencies"
pip --no-build-isolation -e '.[dev,video]'
say "installing the optional kernels, which the tests run without a GPU"
# A CUDA build of torch brought the triton it was built with.
if ! "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("triton") is None)'; then
    pip "triton==3.9.0; platform_system == 'Linux'"
fi
pip --no-deps liger-kernel
if "$python" -c 'import sys; from torch.utils.cpp_extension import CUDA_HOME; sys.exit(CUDA_HOME is not None)' 2>/dev/null; then
    pip --no-deps --no-build-isolation -r requirements/megablocks.txt
else
    say "megablocks would compile its CUDA extension: left to you, see requirements/megablocks.txt"
fi
say "installed; building DeepSpeed's CPU communication op"
"$python" -m ds_moe.engine.cpu
say "ready: $venv"
