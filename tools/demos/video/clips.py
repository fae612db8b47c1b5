"""Clips of a handwritten digit that moves left, right, up or down: every clip is asked about in chat form.

Half of them are encoded as mp4, of 8 frames at 4 a second; the others are lists of 4 images at 2 a second. No frame
tells the direction by itself. The scans of held-out clips are never trained on.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import av
import numpy as np
from PIL import Image

from ds_moe.data.digits import digits_samples
from ds_moe.data.images import load_image

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows, columns
QUESTIONS = ("Which way does it move?", "Where is the digit going?", "Tell me the direction.")
SIDE, DIGIT, STEP = 32, 16, 2  # pixels a side, and between two frames
FRAMES, FPS = 8, 4
LISTED = (0, 2, 4, 6)  # frames of a list


def write_clips(folder: Path, split: Literal["train", "held-out"], count: int) -> Path:
    """Write `count` clips and their records below `folder`; the path of the records."""
    draw = random.Random(f"clips {split}")
    scans = [sample.images[0] for sample in digits_samples(split)[::3]]  # each is asked about three times
    clips = folder / split
    clips.mkdir(parents=True, exist_ok=True)
    file = folder / f"{split}.jsonl"
    with file.open("w") as lines:
        for number in range(count):
            scan = np.asarray(load_image(scans[number % len(scans)], SIDE * SIDE).convert("L"))
            direction = draw.choice(list(DIRECTIONS))
            frames = moving(scan, direction, draw)
            kind = "mp4" if number % 2 else "frames"
            video = encode(frames, clips / f"{number}.mp4") if kind == "mp4" else listed(frames, clips / str(number))
            content = [{"type": "video", **video(folder)}, {"type": "text", "text": draw.choice(QUESTIONS)}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": direction}]
            lines.write(json.dumps({"messages": turns, "kind": kind}) + "\n")
    return file


def moving(scan: np.ndarray, direction: str, draw: random.Random) -> np.ndarray:
    """(FRAMES, SIDE, SIDE, 3) uint8: a scan on its way over a gray ground, somewhere beside its middle."""
    down, right = DIRECTIONS[direction]
    way, room = (FRAMES - 1) * STEP, SIDE - DIGIT
    beside = draw.randint(0, room)
    ahead = draw.randint(0, room - way)
    back = room - ahead  # where one that moves to the left or up begins
    ground, ink = draw.randint(0, 60), draw.randint(150, 255)
    film = np.full((FRAMES, SIDE, SIDE), ground, np.uint8)
    for number in range(FRAMES):
        along = ahead + number * STEP if down + right > 0 else back - number * STEP
        row, column = (along, beside) if down else (beside, along)
        film[number, row : row + DIGIT, column : column + DIGIT] = np.maximum(ground, scan.astype(int) * ink // 255)
    return np.repeat(film[..., None], 3, axis=-1)


def encode(frames: np.ndarray, path: Path):
    """Write an mp4; what its part of a record holds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return lambda folder: {"video": str(path.relative_to(folder))}


def listed(frames: np.ndarray, path: Path, chosen: Sequence[int] = LISTED):
    """Write images; what the part of a record holds."""
    path.mkdir(exist_ok=True)
    paths = [path / f"{number}.png" for number in chosen]
    for number, file in zip(chosen, paths, strict=True):
        Image.fromarray(frames[number]).save(file)
    return lambda folder: {"frames": [str(file.relative_to(folder)) for file in paths], "fps": FPS / 2}
