"""The default backend: torch's grouped GEMM on the stored weights, without padding or copies."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_moe.moe.backends.reference import reference


def grouped_mm(rows_RI: Tensor, weight_eOI: Tensor, counts_e: Tensor) -> Tensor:
    """`rows @ weight[i].T` for each expert's rows, in one kernel where the device has one.

    Raises:
        RuntimeError: float64, or strides that are no multiple of 16 bytes (torch's own limits): use `reference`.
    """
    if rows_RI.shape[0] == 0:  # torch 2.13's backward refuses the strides of empty tensors
        return reference(rows_RI, weight_eOI, counts_e)
    offsets_e = counts_e.cumsum(0, dtype=torch.int32)
    return F.grouped_mm(rows_RI, weight_eOI.transpose(-2, -1), offs=offsets_e)
