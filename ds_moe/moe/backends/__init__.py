"""Kernels by kind. A new one is one class in one file and one line in `BACKENDS`.

base.py       what a backend offers               swiglu.py         gated experts and their gradients
grouped_mm.py torch's grouped GEMM                reference.py      a loop over experts, to compare with
liger.py      liger-kernel's fused experts        megablocks.py     megablocks' kernels that move rows
optional.py   why a package cannot be used here   megablocks_ops.py torch in place of its compiled parts
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from ds_moe.moe.backends.base import Backend, Order
from ds_moe.moe.backends.grouped_mm import GroupedMM
from ds_moe.moe.backends.liger import Liger
from ds_moe.moe.backends.megablocks import Megablocks
from ds_moe.moe.backends.megablocks_ops import compiled
from ds_moe.moe.backends.reference import Reference
from ds_moe.moe.backends.swiglu import Recompute

__all__ = ["BACKENDS", "Backend", "Order", "Recompute", "backend_for", "choose"]

BACKENDS: dict[str, type[Backend]] = {
    "grouped_mm": GroupedMM,
    "megablocks": Megablocks,
    "liger": Liger,
    "reference": Reference,
}


def choose(device: str, dtype: torch.dtype) -> tuple[str, str]:
    """What `auto` means for rows of a dtype on a kind of device: (kind, why)."""
    if device != "cuda":
        return "grouped_mm", "torch's grouped GEMM, as fast as a loop over the experts here and in one call"
    major, minor = torch.cuda.get_device_capability()
    if dtype == torch.bfloat16 and major in (9, 10):
        return "grouped_mm", "torch's grouped GEMM is one kernel here, and needs no counts on the host"
    if dtype == torch.bfloat16 and Megablocks.obstacle(device) is None and compiled("grouped_gemm"):
        return "megablocks", f"on compute capability {major}.{minor} torch loops over the experts; grouped_gemm is here"
    return "grouped_mm", f"torch loops over the experts for {dtype} on compute capability {major}.{minor}"


def backend_for(kind: str, tensor: Tensor) -> Backend:
    """The backend of a kind, a key of `BACKENDS` or `auto`, for rows on the device and in the dtype of `tensor`."""
    return _backend(kind, tensor.device.type, tensor.dtype)


@cache
def _backend(kind: str, device: str, dtype: torch.dtype) -> Backend:
    if kind != "auto":
        return BACKENDS[kind]()
    chosen, why = choose(device, dtype)
    logging.getLogger(__name__).info("experts: backend %s for %s on %s: %s", chosen, dtype, device, why)
    return BACKENDS[chosen]()
