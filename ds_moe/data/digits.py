"""The demo's data: scikit-learn's 1,797 scans of handwritten digits, asked about in chat form.

Every image is asked about in three ways: which digit it is, whether that is even, whether it is at least five. The
wording varies. The split is by image, so that no held-out scan is ever trained on. `write_digits` writes the same
samples as PNG files and JSONL, the form in which users bring their own images.
"""

import hashlib
import io
import json
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ds_moe.data.chat import BadRecord, Sample, Turn
from ds_moe.data.images import ImageSource
from ds_moe.data.record_kind import CHAT, RecordKind, SourceFacts

Split = Literal["train", "held-out"]
SPLIT_KEYS: dict[Split, str] = {"train": "data.train", "held-out": "data.eval"}

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


class DigitsRecords:
    """A split of the scans, three samples an image, with the interface of a data file (`record_kind.Records`)."""

    def __init__(self, split: Split):
        self._samples = digits_samples(split)
        self.bad: list[BadRecord] = []
        self.sources: tuple[SourceFacts, ...] = ()
        self.remembered: list[None] = [None] * len(self._samples)
        self.kinds: tuple[str, ...] = tuple(sorted(QUESTIONS))
        self.record_kind: RecordKind[Sample] = CHAT
        self.lengths = np.array([len(sample.last_question()) + len(sample.answer) for sample in self._samples])
        text = json.dumps([(sample.last_question(), sample.answer) for sample in self._samples])
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int) -> Sample:
        return self._samples[index]

    def where(self, index: int) -> str:
        return self._samples[index].where


@lru_cache(maxsize=2)
def digits_samples(split: Split) -> list[Sample]:
    """All samples of a split, those of one image together. Split and wordings are the same in every process."""
    pictures, labels = _scans()
    order = np.random.default_rng(0).permutation(len(labels))
    chosen = order[HELD_OUT:] if split == "train" else order[:HELD_OUT]
    wording = random.Random(f"digits {split}")
    samples = []
    for scan in chosen:
        image = ImageSource(name=f"digits/{scan:04d}.png", data=_png(pictures[scan]))
        for kind, wordings in QUESTIONS.items():
            turns = (
                Turn("user", (image, wording.choice(wordings))),
                Turn("assistant", (ANSWERS[kind](int(labels[scan])),)),
            )
            samples.append(Sample(turns, where=f"digits:{scan}", kind=kind))
    return samples


def write_digits(folder: str | Path) -> tuple[Path, Path]:
    """Write both splits below `folder`, images as digits/*.png; return the paths of train.jsonl and held_out.jsonl."""
    folder = Path(folder)
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    return _write_split(folder / "train.jsonl", "train"), _write_split(folder / "held_out.jsonl", "held-out")


def _write_split(file: Path, split: Split) -> Path:
    with file.open("w", encoding="utf-8") as lines:
        for sample in digits_samples(split):
            [image] = sample.images
            (file.parent / image.name).write_bytes(image.data or b"")
            content = [{"type": "image", "image": image.name}, {"type": "text", "text": sample.last_question()}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": sample.answer}]
            lines.write(json.dumps({"messages": messages, "kind": sample.kind}) + "\n")
    return file


def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 8, 8), float from 0 to 16, and digits (1797,), int."""
    from sklearn.datasets import load_digits  # an import of a second, which other data do not need

    pixels, digits = load_digits(return_X_y=True)
    return np.reshape(pixels, (-1, 8, 8)), np.asarray(digits)


def _png(scan: np.ndarray) -> bytes:
    gray = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
    stream = io.BytesIO()
    gray.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB").save(stream, "PNG")
    return stream.getvalue()
