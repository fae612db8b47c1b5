"""Kernels that move rows and multiply them by expert, by kind. A new kind is one class and one line in `BACKENDS`.

base.py            what every backend offers, and the gradients of a product
swiglu.py          SiLU-gated experts as one autograd function
swiglu_triton.py   its passes between the products as Triton kernels, for GPUs
grouped_mm.py      torch's grouped GEMM: the default
reference.py       a loop over the experts, for tests
liger.py           liger-kernel's fused experts
megablocks.py      megablocks' sort and kernels that move rows, and grouped_gemm's product
megablocks_ops.py  torch code in place of the parts of megablocks that are not compiled
optional.py        whether a package of Triton kernels can be used
"""

import logging
from functools import cache

import torch
from torch import Tensor

from ds_moe.moe.backends.base import Backend, Permutation
from ds_moe.moe.backends.grouped_mm import GroupedMM
from ds_moe.moe.backends.liger import Liger
from ds_moe.moe.backends.megablocks import Megablocks
from ds_moe.moe.backends.megablocks_ops import compiled
from ds_moe.moe.backends.reference import Reference
from ds_moe.moe.backends.swiglu import Recompute

__all__ = ["BACKENDS", "Backend", "Permutation", "Recompute", "backend_for", "choose_backend"]

BACKENDS = {"grouped_mm": GroupedMM, "megablocks": Megablocks, "liger": Liger, "reference": Reference}


def choose_backend(device: str, dtype: torch.dtype) -> tuple[str, str]:
    """The kind that `auto` stands for, given rows of a dtype on a kind of device: (kind, why)."""
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
    chosen, why = choose_backend(device, dtype)
    logging.getLogger(__name__).info("experts: backend %s for %s on %s: %s", chosen, dtype, device, why)
    return BACKENDS[chosen]()
