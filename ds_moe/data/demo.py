"""The demo's data: scikit-learn's 1,797 scans of handwritten digits, asked about in chat form.

`digits_samples("train" | "held-out", seed)` gives samples in memory; `write_digits(folder)` writes the same
as PNG files plus JSONL, the form in which a user brings their own images.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "held-out"]

# Every wording ends in a way that says which answer words are expected, as a user's own data would.
QUESTIONS: dict[str, list[str]] = {
    "digit": [
        "Which digit is this?",
        "What digit do you see?",
        "Read the digit in this image.",
        "Name the handwritten digit.",
        "What number is written here?",
        "Which number does the scan show?",
    ],
    "parity": [
        "Is this digit even or odd?",
        "Even or odd?",
        "Is the number in the image odd or even?",
        "Tell me whether this digit is even or odd.",
        "Say if the handwritten number is odd or even.",
    ],
    "at_least_five": [
        "Is this digit at least five?",
        "Is the number five or more?",
        "Does the image show a digit of at least five?",
        "Is what is written here at least five, yes or no?",
        "Tell me whether this number is five or more.",
    ],
}
ANSWERS: dict[str, Callable[[int], str]] = {
    "digit": str,
    "parity": lambda digit: "odd" if digit % 2 else "even",
    "at_least_five": lambda digit: "yes" if digit >= 5 else "no",
}
HELD_OUT = 360  # images of the 1,797; the other 1,437 are trained on
IMAGE_SIZE = 16  # pixels a side, twice the scans' 8
