"""Stand-ins for the compiled parts of megablocks, so that its Python and Triton code runs wherever torch does.

megablocks imports two CUDA extensions: `megablocks_ops`, which a wheel built without a CUDA compiler lacks, and
`grouped_gemm`, for its expert layers. Both are a few functions, which this module writes in torch. The backend uses
`sort` and `histogram`; the others are for megablocks' own layers, with which benchmarks and tests compare ours.
"""

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

INSTALL = "pip install --no-deps --no-build-isolation megablocks==0.10.0 stanford-stk==0.7.1"


def megablocks_obstacle(device: str | None = None) -> str | None:
    """Why megablocks cannot be used on a kind of device, and the fix; None: it can."""
    return obstacle({"megablocks": INSTALL, "stk": INSTALL}, device)


def active() -> str:
    """Name what runs beside megablocks' Triton kernels: its compiled ops and GEMM, or torch's."""
    ops = "compiled megablocks_ops" if compiled("megablocks_ops") else "torch ops in place of megablocks_ops"
    return f"{ops}, {'grouped_gemm' if compiled('grouped_gemm') else 'torch grouped_mm'}"


@cache
def compiled(name: str) -> ModuleType | None:
    """A compiled part of megablocks, or None if it is missing, broken or of no use.

    The compiled parts take CUDA tensors only, so they are of no use to Triton's interpreter, which works on the CPU.
    """
    if interpreted() or isinstance(sys.modules.get(name), StandIn) or find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # the extension was built for another torch or CUDA
        logging.getLogger(__name__).warning("%s is installed but cannot be used, torch stands in: %s", name, error)
        return None


@cache
def load_megablocks(device: str) -> ModuleType:
    """The package megablocks, with stand-ins for what is not compiled. Raises `UserError` where it cannot be used."""
    if reason := megablocks_obstacle(device):
        raise UserError(f"moe.experts.backend=megablocks: {reason}")
    install_stand_ins()
    megablocks = importlib.import_module("megablocks")
    # megablocks holds the stand-in by now. In sys.modules, other code would take it for the compiled package.
    if isinstance(sys.modules["grouped_gemm"], StandIn):
        del sys.modules["grouped_gemm"]
    if interpreted():
        keep_one_config(megablocks.backend.kernels)
    return megablocks


def install_stand_ins() -> None:
    """Put a stand-in into `sys.modules` for each part that is not compiled. Must run before megablocks is imported."""
    for name, make in (("megablocks_ops", torch_ops), ("grouped_gemm", torch_grouped_gemm)):
        if compiled(name) is None:
            sys.modules.setdefault(name, make())


class StandIn(ModuleType):
    """A module made by this file in place of a compiled one."""

    def __init__(self, name: str, **attributes: object) -> None:
        super().__init__(name, "Made by ds_moe of torch ops.")
        self.__spec__ = ModuleSpec(name, None)  # find_spec raises for a module without a spec
        self.__dict__.update(attributes)


def torch_ops() -> StandIn:
    """Make `megablocks_ops`. Integers are int16, int32 or int64; results go into `out`, as in the CUDA functions."""

    def sort(x_N: Tensor, end_bit: int, x_out_N: Tensor, iota_out_N: Tensor) -> None:
        """Sort stably by the lowest `end_bit` bits."""
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
        """Write each bin's value to every position of the bin; positions past the last bin are undefined."""
        out_BN.copy_(x_BE[:, bin_of(bins_E, out_BN.shape[1]).clamp_max(bins_E.numel() - 1)])

    def replicate_backward(grad_BN: Tensor, bins_E: Tensor, out_BE: Tensor) -> None:
        """Sum the gradients of each bin's positions."""
        sums = torch.zeros(grad_BN.shape[0], bins_E.numel() + 1, dtype=torch.float32, device=grad_BN.device)
        sums.index_add_(1, bin_of(bins_E, grad_BN.shape[1]), grad_BN.float())
        out_BE.copy_(sums[:, :-1])

    def indices(padded_bins_E: Tensor, block_size: int, block_rows: int, block_columns: int, out: Tensor) -> None:
        """The column of every block of a block-diagonal matrix, one row of blocks after the other."""
        expert_of_row = bin_of(padded_bins_E // block_size, block_rows)
        columns = torch.arange(block_columns, device=out.device)
        out.copy_((expert_of_row.unsqueeze(1) * block_columns + columns).flatten())

    functions = sort, histogram, inclusive_cumsum, exclusive_cumsum, replicate_forward, replicate_backward, indices
    return StandIn("megablocks_ops", **{function.__name__: function for function in functions})


def torch_grouped_gemm() -> StandIn:
    """Make `grouped_gemm` from torch's grouped product: any dtype and device, with gradients."""
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
