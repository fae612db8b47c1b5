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
    """`F.grouped_mm`. What it refuses (float64, rows not a multiple of 16 bytes) is multiplied expert by expert."""

    def product(self, rows_RI: Tensor, weight_eIO: Tensor, counts_e: Tensor) -> Tensor:
        if not _takes(rows_RI, weight_eIO, weight_eIO.shape[2]):
            return LOOP.product(rows_RI, weight_eIO, counts_e)
        return F.grouped_mm(rows_RI, weight_eIO, offs=counts_e.cumsum(0, dtype=torch.int32))

    def outer(self, left_RO: Tensor, right_RI: Tensor, counts_e: Tensor) -> Tensor:
        if not _takes(left_RO, right_RI, right_RI.shape[1]):
            return LOOP.outer(left_RO, right_RI, counts_e)
        return F.grouped_mm(left_RO.T, right_RI, offs=counts_e.cumsum(0, dtype=torch.int32))


def _takes(rows: Tensor, other: Tensor, outputs: int) -> bool:
    if rows.shape[0] == 0:  # grouped_mm refuses the strides of an empty tensor
        return False
    widths = rows.shape[1], outputs
    aligned = all(width * rows.element_size() % 16 == 0 for width in widths)
    if rows.is_cuda:
        aligned = aligned and rows.data_ptr() % 16 == other.data_ptr() % 16 == 0
    if rows.dtype == torch.float64 or not aligned:
        warn_once(str(rows.dtype), *widths)
        return False
    return True


@cache
def warn_once(dtype: str, inner: int, outer: int) -> None:
    """Warn that the loop is used; the cache makes it one warning for each shape."""
    logging.getLogger(__name__).warning(
        "torch's grouped_mm takes no %s of %d x %d (float64, or rows not aligned to 16 bytes): expert by expert",
        *(dtype, inner, outer),
    )
