"""Grouped matrix products. One signature for all: rows sorted by expert times that expert's matrix.

    multiply(rows_RI, weight_eOI, counts_e) -> rows_RO

A new backend is one function in one file and one line in `BACKENDS`.
"""

from ds_moe.moe.backends.grouped_mm import grouped_mm
from ds_moe.moe.backends.reference import reference

BACKENDS = {"grouped_mm": grouped_mm, "reference": reference}
