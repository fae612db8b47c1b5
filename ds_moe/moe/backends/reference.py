"""The slow backend that the fast ones are compared with: a loop over experts, any dtype, any shape."""

import torch
from torch import Tensor


def reference(rows_RI: Tensor, weight_eOI: Tensor, counts_e: Tensor) -> Tensor:
    """`rows @ weight[i].T` for each expert's rows; an expert without rows gets a zero gradient, not none."""
    chunks = rows_RI.split(counts_e.tolist())
    return torch.cat([rows @ weight.t() for rows, weight in zip(chunks, weight_eOI.unbind(0), strict=True)])
