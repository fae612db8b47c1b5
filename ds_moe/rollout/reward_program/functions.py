"""Reward functions of a user, imported and called: what they are, what they return, what they raise."""

import importlib
import inspect
import math
import numbers
import os
import sys
import traceback
import types
from collections.abc import Callable

from ds_moe.rollout.reward_program.protocol import Json

LARGEST = 1e9  # of a reward, of either sign, as rollout files have it
FOLDER = os.path.dirname(__file__)

RewardCallable = Callable[[str, str, Json], object]  # of a completion, the answer and the record


def find_function(one: Json) -> RewardCallable:
    """Import a function: {"module", "attribute"}, and with "source" that text of the file "file".

    Raises whatever the module raises, and `TypeError` for what cannot be called with three arguments.
    """
    module = _from_source(one) if "source" in one else importlib.import_module(str(one["module"]))
    attribute = str(one["attribute"])
    function = getattr(module, attribute, None)
    if function is None:
        names = [name for name in vars(module) if not name.startswith("_") and callable(vars(module)[name])]
        raise AttributeError(f"it has no {attribute} (it has: {', '.join(names) or 'no function'})")
    if not callable(function):
        raise TypeError(f"{attribute} is no function")
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{attribute} is async; write a plain function")
    try:
        inspect.signature(function).bind("", "", {})
    except TypeError as error:
        raise TypeError(f"{attribute} is called with (completion, answer, record), but {error}") from error
    except ValueError:
        pass  # of a builtin without a signature
    return function


def _from_source(one: Json) -> types.ModuleType:
    """The text that the trainer read at its start, so that a file edited since does not change the reward of a run."""
    file, name = str(one["file"]), str(one["module"])
    if getattr(sys.modules.get(name), "__file__", None) == file:
        return sys.modules[name]  # of another function of the same file
    if name in sys.modules or name in sys.stdlib_module_names:
        name = f"reward_{name}"
    module = types.ModuleType(name)
    module.__file__ = file
    sys.modules[name] = module
    if (folder := os.path.dirname(file)) not in sys.path:
        sys.path.insert(0, folder)  # as for a script: modules beside it can be imported
    exec(compile(str(one["source"]), file, "exec"), module.__dict__)
    return module


class NoReward(Exception):
    """A function returned what is no reward; `kind` tells such values apart."""

    def __init__(self, kind: str, text: str = "") -> None:
        super().__init__(text or kind)
        self.kind = kind


def number_of(value: object) -> float:
    """A finite float of what a function returned: a number of Python, NumPy or a tensor, True and False included."""
    if not isinstance(value, numbers.Real) and callable(item := getattr(value, "item", None)):
        try:
            value = item()
        except Exception as error:
            raise NoReward(f"returned a {type(value).__name__} of more than one number") from error
    if not isinstance(value, numbers.Real):
        raise NoReward("returned None" if value is None else f"returned a {type(value).__name__}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise NoReward(f"returned {number}")
    if abs(number) > LARGEST:
        raise NoReward("returned too large a number", f"returned {number:g}, which is beyond {LARGEST:g}")
    return number


def failure_of(error: BaseException) -> Json:
    """Kind and text of what a function raised, with the place in the user's file that it came from."""
    if isinstance(error, NoReward):
        return {"kind": error.kind, "error": str(error)}
    kind = type(error).__name__
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = ""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if os.path.dirname(frame.filename) != FOLDER and frame.filename[:1] != "<"
    ]
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        place = ""  # its text has the place
    return {"kind": kind, "error": f"{kind}{': ' if text else ''}{text[:400]}{place}"}
