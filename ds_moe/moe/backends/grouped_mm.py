"""torch's grouped GEMM on the stored weights: no padding, no copies."""

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_moe.moe.backends.base import Backend
from ds_moe.moe.backends.reference import Reference

LOOP = Reference()


class GroupedMM(Backend):
    """`F.grouped_mm`. What it refuses (float64, rows that are no multiple of 16 bytes) goes expert by expert."""

    def product(self, rows_RI: Tensor, weight_eIO: Tensor, counts_e: Tensor) -> Tensor:
        if not _takes(rows_RI.shape[1], weight_eIO.shape[2], rows_RI):
            return LOOP.product(rows_RI, weight_eIO, counts_e)
        return F.grouped_mm(rows_RI, weight_eIO, offs=counts_e.cumsum(0, dtype=torch.int32))

    def outer(self, left_RO: Tensor, right_RI: Tensor, counts_e: Tensor) -> Tensor:
        if not _takes(left_RO.shape[1], right_RI.shape[1], left_RO):
            return LOOP.outer(left_RO, right_RI, counts_e)
        return F.grouped_mm(left_RO.T, right_RI, offs=counts_e.cumsum(0, dtype=torch.int32))


def _takes(inner: int, outer: int, rows: Tensor) -> bool:
    if rows.shape[0] == 0:  # its strides are refused
        return False
    wide = rows.dtype == torch.float64
    if wide or any(width * rows.element_size() % 16 for width in (inner, outer)):
        say_so(str(rows.dtype), inner, outer)
        return False
    return True


@cache
def say_so(dtype: str, inner: int, outer: int) -> None:
    """Once a shape."""
    logging.getLogger(__name__).warning(
        "torch's grouped_mm takes no %s of %d x %d (float64, or rows of no multiple of 16 bytes): expert by expert",
        *(dtype, inner, outer),
    )
