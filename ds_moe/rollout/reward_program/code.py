"""Digests of the modules that reward functions are made of."""

import hashlib
import os
import sys
import sysconfig
from contextlib import suppress

from ds_moe.rollout.reward_program.protocol import Json

INSTALLED = ("site-packages", "dist-packages")  # folders of packages that are not the user's own
STDLIB = sysconfig.get_paths()["stdlib"] + os.sep


def code_of(functions: list[Json], before: set[str]) -> dict[str, str]:
    """Name of a module -> digest of its file, of what the functions are made of beside the texts that are known.

    These are the modules that their import has loaded, but for Python's own and those of installed packages; of a
    package that a function is named by, also an installed one, all that was loaded.

    Args:
        before: names of the modules that were there before.
    """
    packages = {str(one["module"]).partition(".")[0] for one in functions if "source" not in one}
    texts = {one["file"] for one in functions if "source" in one}
    found = {}
    for name in sys.modules.keys() - before:
        with suppress(Exception):  # what stands there may be anything, and its file may be none
            file = os.path.abspath(sys.modules[name].__file__ or "")
            others = file.startswith(STDLIB) or any(part in INSTALLED for part in file.split(os.sep))
            if file not in texts and (name.partition(".")[0] in packages or not others):
                with open(file, "rb") as stream:
                    found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def edited_module(before: dict[str, str], now: dict[str, str]) -> str | None:
    """The first module by name that is another one now; None: all are as they were."""
    return min((name for name in before.keys() | now.keys() if before.get(name) != now.get(name)), default=None)
