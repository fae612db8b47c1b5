"""Routers: hidden states in, a `RoutingDecision` out.

A new kind is a file here, whose class says its `kind`, and a class with its keys in `ds_moe.config.moe`.

base.py           score -> select -> weigh          topk.py    each token chooses its experts
expert_choice.py  each expert chooses its tokens    fixed.py   nothing is learned: hash, balanced
limits.py         expert dropout and capacity
"""

from importlib import import_module
from pkgutil import iter_modules

from ds_moe.moe.routers.base import ROUTERS, Router

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")  # a class with a `kind` enters itself into ROUTERS

__all__ = ["ROUTERS", "Router"]
