"""Packages of Triton kernels are optional: why one cannot be used, and how its kernels run on CPU tensors in tests."""

import os
import sys
from importlib.util import find_spec
from types import ModuleType

import torch


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: in Python and on CPU tensors, too slow for anything but tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def obstacle(packages: dict[str, str], device: str | None = None) -> str | None:
    """Why kernels cannot take tensors on a kind of device, and the fix; None: they can. Imports none of the packages.

    Args:
        packages: name of a module -> how its package is installed.
        device: a torch device type; None: `cuda` if torch finds a GPU, else `cpu`.
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
    # Triton decides when it is imported whether its own functions are compiled or interpreted.
    if triton is not None and type(triton.language.cdiv).__name__ != "InterpretedFunction":
        return "TRITON_INTERPRET=1 was set after Triton was imported: set it at the start"
    return None


def keep_one_config(kernels: ModuleType) -> None:
    """Reduce each autotuned kernel of a module to one configuration: the interpreter has no GPU to time several on."""
    from triton.runtime import Autotuner

    for kernel in vars(kernels).values():
        if isinstance(kernel, Autotuner):
            del kernel.configs[1:]
