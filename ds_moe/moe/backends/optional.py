"""Packages of Triton kernels, which may be missing: why one cannot be used here, and how it runs on CPU tensors."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from types import ModuleType

import torch


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter: in Python, on CPU tensors, far too slow for more than tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def obstacle(packages: dict[str, str], device: str | None = None) -> str | None:
    """Why kernels cannot take tensors on a kind of device, and the fix; None: they can. Imports nothing.

    Args:
        packages: name of a module -> how its package is installed.
        device: None: `cuda` where there is one.
    """
    packages = packages | {"triton": "a CUDA build of torch brings it, elsewhere: pip install triton==3.9.0"}
    for name, fix in packages.items():
        if find_spec(name) is None:
            return f"{name} is not installed; {fix}"
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu":
        return None
    if not interpreted():
        return "Triton runs on CPU tensors only in its interpreter (for tests): set TRITON_INTERPRET=1 at the start"
    triton = sys.modules.get("triton")
    # Triton's own functions are made for one of the two when it is imported.
    if triton is not None and type(triton.language.cdiv).__name__ != "InterpretedFunction":
        return "TRITON_INTERPRET=1 was set after Triton was imported: set it at the start"
    return None


def keep_one_config(kernels: ModuleType) -> None:
    """Leave each kernel of a module one of its autotuned configurations: an interpreter has no GPU to time them on."""
    from triton.runtime import Autotuner

    for kernel in vars(kernels).values():
        if isinstance(kernel, Autotuner):
            del kernel.configs[1:]
