"""Finds what a benchmark needs of ds_moe in whichever build of it a process imports, this one or an earlier one.

Processes of an earlier build import this module too, so it imports nothing of ds_moe by itself.
"""

import importlib
from pathlib import Path
from typing import Any

MODULES = {  # what: where it is, the newest build's place first
    "CACHE_BYTES": ("ds_moe.data.encoder", "ds_moe.data.loading"),
    "RunConfig": ("ds_moe.config.run", "ds_moe.config"),
    "TrainStream": ("ds_moe.data.stream",),
    "load_processor": ("ds_moe.models.processor",),
    "load_run": ("ds_moe.config.run_file", "ds_moe.runfile"),
    "set_up": ("ds_moe.training.set_up", "ds_moe.run"),
    "train_step": ("ds_moe.training.step", "ds_moe.step"),
}


def check_build(checkout: str) -> None:
    """Raise `ImportError` where ds_moe is another build than that of the checkout."""
    package = importlib.import_module("ds_moe")
    if not Path(str(package.__file__)).is_relative_to(checkout):
        raise ImportError(f"{package.__file__} was imported, not the build in {checkout}")


def module_with(name: str) -> Any:
    """The module of this build that has a name of `MODULES`. Raises `LookupError` where none has."""
    for module in MODULES[name]:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        if hasattr(found, name):
            return found
    raise LookupError(f"this build of ds_moe has no {name} in any of {MODULES[name]}")
