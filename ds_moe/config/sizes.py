"""Sizes of memory as people write them on a command line: 80, 80GB, 80GiB, 81920MB."""

import re
from argparse import ArgumentTypeError

SIZE = "80, 80GB and 80GiB are 80 GiB, as makers of GPUs count; so are 81920MB"  # for the help of an option
_GIB = {"m": 1 / 1024, "": 1.0, "g": 1.0, "t": 1024.0}  # GiB of a unit, by its first letter


def gib(text: str) -> float:
    """GiB of a size; `ArgumentTypeError` for what is none, so that argparse takes this function as a `type`.

    A number alone is GiB, and GB is GiB too: an accelerator sold with 80 GB has 80 x 2**30 bytes.
    """
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(?:([mgt])(?:i?b)?)?", text.strip(), re.IGNORECASE | re.ASCII)
    size = float(found[1]) * _GIB[(found[2] or "").lower()] if found else 0.0
    if not 0 < size < float("inf"):
        raise ArgumentTypeError(f"{text} is no size of memory; write it as 80GB, 80GiB, 81920MB or 80 (GiB)")
    return size
