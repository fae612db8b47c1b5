"""What stands in for the compiled parts of megablocks, so that its own Python and Triton code runs wherever torch does.

Its modules import `megablocks_ops`, a CUDA extension that a wheel built without a CUDA compiler lacks, and
`grouped_gemm`, another one, for its expert layers. Both are a few functions, written here in torch; the backend needs
`sort` and `histogram`, megablocks' own layers (which benchmarks and tests compare with) the others.
"""

from __future__ import annotations

import importlib
import logging
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from ds_moe.errors import UserError
from ds_moe.moe.backends.grouped_mm import GroupedMM
from ds_moe.moe.backends.optional import interpreted, keep_one_config, obstacle

INSTALL = "pip install --no-deps --no-build-isolation -r requirements/megablocks.txt"


def importable(device: str | None = None) -> str | None:
    """Why the backend cannot be used on a kind of device (None: the one there is), and the fix; None: it can."""
    return obstacle({"megablocks": INSTALL, "stk": INSTALL}, device)


def active() -> str:
    """What runs beside megablocks' Triton kernels: its compiled ops and GEMM, or torch's."""
    ops = "compiled megablocks_ops" if compiled("megablocks_ops") else "torch ops in place of megablocks_ops"
    return f"{ops}, {'grouped_gemm' if compiled('grouped_gemm') else 'torch grouped_mm'}"


@cache
def compiled(name: str) -> ModuleType | None:
    """A compiled part, if it can be used: it takes CUDA tensors only, and the interpreter's are on the CPU."""
    if interpreted() or isinstance(sys.modules.get(name), StandIn) or find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # built for another torch, or another CUDA
        logging.getLogger(__name__).warning("%s is installed but cannot be used, torch stands in: %s", name, error)
        return None


@cache
def load(device: str) -> ModuleType:
    """megablocks with its `ops`, `backend.kernels` and layers, whatever of it is compiled.

    Raises:
        UserError: it cannot be used on this kind of device.
    """
    if reason := importable(device):
        raise UserError(f"moe.experts.backend=megablocks: {reason}")
    install()
    megablocks = importlib.import_module("megablocks")
    # Bound by now. Left there, it would be taken for the compiled package.
    if isinstance(sys.modules["grouped_gemm"], StandIn):
        del sys.modules["grouped_gemm"]
    if interpreted():
        keep_one_config(megablocks.backend.kernels)
    return megablocks


def install() -> None:
    """Put a stand-in into `sys.modules` for each part that is not compiled; before megablocks is imported."""
    for name, make in (("megablocks_ops", torch_ops), ("grouped_gemm", torch_grouped_gemm)):
        if compiled(name) is None:
            sys.modules.setdefault(name, make())


class StandIn(ModuleType):
    """Written here."""

    def __init__(self, name: str, **attributes: object) -> None:
        super().__init__(name, "Made by ds_moe of torch ops.")
        self.__spec__ = ModuleSpec(name, None)  # without one, find_spec raises
        self.__dict__.update(attributes)


def torch_ops() -> StandIn:
    """`megablocks_ops`. Integers are int16, int32 or int64; `out` is filled, as the CUDA functions do."""

    def sort(x_N: Tensor, end_bit: int, x_out_N: Tensor, iota_out_N: Tensor) -> None:
        """Stable, by the lowest `end_bit` bits."""
        narrow = torch.uint8 if end_bit <= 8 else torch.int16 if end_bit <= 15 else x_N.dtype
        order_N = torch.argsort((x_N & ((1 << end_bit) - 1)).to(narrow), stable=True)
        x_out_N.copy_(x_N[order_N])
        iota_out_N.copy_(order_N)

    def histogram(x: Tensor, num_bins: int) -> Tensor:
        """int32 counts of 0 ... num_bins - 1 along the last dimension."""
        counts = torch.zeros(*x.shape[:-1], num_bins, dtype=torch.int32, device=x.device)
        return counts.scatter_add_(-1, x.long(), torch.ones_like(x, dtype=torch.int32))

    def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
        out.copy_(x.cumsum(dim))

    def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
        out.copy_(x.cumsum(dim) - x)

    def bin_of(bins_E: Tensor, count: int) -> Tensor:
        """The bin in which each of `count` positions lies, E past the last; `bins_E` are the bins' ends."""
        return torch.searchsorted(bins_E, torch.arange(count, dtype=bins_E.dtype, device=bins_E.device), right=True)

    def replicate_forward(x_BE: Tensor, bins_E: Tensor, out_BN: Tensor) -> None:
        """Each bin's value at every position of it; what lies past the last bin is undefined."""
        out_BN.copy_(x_BE[:, bin_of(bins_E, out_BN.shape[1]).clamp_max(bins_E.numel() - 1)])

    def replicate_backward(grad_BN: Tensor, bins_E: Tensor, out_BE: Tensor) -> None:
        """The sum over each bin."""
        sums = torch.zeros(grad_BN.shape[0], bins_E.numel() + 1, dtype=torch.float32, device=grad_BN.device)
        sums.index_add_(1, bin_of(bins_E, grad_BN.shape[1]), grad_BN.float())
        out_BE.copy_(sums[:, :-1])

    def indices(padded_bins_E: Tensor, block_size: int, block_rows: int, block_columns: int, out: Tensor) -> None:
        """Column of every block of a block-diagonal matrix, rows of blocks one after the other."""
        expert_of_row = bin_of(padded_bins_E // block_size, block_rows)
        columns = torch.arange(block_columns, device=out.device)
        out.copy_((expert_of_row.unsqueeze(1) * block_columns + columns).flatten())

    functions = sort, histogram, inclusive_cumsum, exclusive_cumsum, replicate_forward, replicate_backward, indices
    return StandIn("megablocks_ops", **{function.__name__: function for function in functions})


def torch_grouped_gemm() -> StandIn:
    """`grouped_gemm` of torch's grouped product, for megablocks' own layers: any dtype, any device, with gradients."""
    products = GroupedMM()

    def ops_gmm(a_RI: Tensor, b: Tensor, batch_sizes_e: Tensor, trans_b: bool = False) -> Tensor:
        weight_eOI = b if trans_b else b.transpose(-2, -1)
        return products.multiply(a_RI, weight_eOI, batch_sizes_e.to(a_RI.device))

    def backend_gmm(
        a: Tensor,
        b: Tensor,
        batch_sizes_e: Tensor,
        trans_a: bool = False,
        trans_b: bool = False,
        c: Tensor | None = None,
    ) -> Tensor:
        counts_e = batch_sizes_e.to(a.device)
        if trans_a:
            result = products.outer(a, b, counts_e)
        else:
            result = products.product(a, b.transpose(-2, -1) if trans_b else b, counts_e)
        return result if c is None else c.copy_(result)

    ops, backend = StandIn("grouped_gemm.ops", gmm=ops_gmm), StandIn("grouped_gemm.backend", gmm=backend_gmm)
    return StandIn("grouped_gemm", ops=ops, backend=backend)
