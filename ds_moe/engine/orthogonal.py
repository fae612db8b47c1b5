"""Muon's update: about the nearest matrix of orthogonal rows or columns, by a Newton-Schulz iteration (Jordan 2024)."""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's, as in `torch.optim.Muon`
ITERATIONS = 5
# Below this norm fp32 loses the squares that make a norm. torch's 1e-7 would shorten the steps of an expert that is
# seldom chosen: a loss that is a mean over 1e6 tokens has gradients of that size.
SMALLEST = 1e-18
RMS = 0.2  # of an update's entries, about that of AdamW's (Liu et al. 2025, arXiv 2502.16982)


def orthogonal(x_nRC: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, R, C) in `dtype`: each matrix with its singular values moved to about 1, between .7 and 1.2; zeros stay."""
    a, b, c = COEFFICIENTS
    norm_n11 = torch.linalg.vector_norm(x_nRC, dim=(-2, -1), keepdim=True)
    tall = x_nRC.shape[-2] > x_nRC.shape[-1]
    x_nSL = (x_nRC / norm_n11.clamp_min(SMALLEST)).to(dtype)
    x_nSL = x_nSL.mT if tall else x_nSL
    for _ in range(ITERATIONS):
        gram_nSS = x_nSL @ x_nSL.mT
        polynomial_nSS = torch.baddbmm(gram_nSS, gram_nSS, gram_nSS, beta=b, alpha=c)
        x_nSL = torch.baddbmm(x_nSL, polynomial_nSS, x_nSL, beta=a)
    return x_nSL.mT if tall else x_nSL


def scale(rows: int, columns: int) -> float:
    """By which an orthogonal matrix is multiplied so that its entries have about the RMS of AdamW's updates."""
    return RMS * max(rows, columns) ** 0.5
