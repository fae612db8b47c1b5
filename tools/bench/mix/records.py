"""Records like `screens.csv`: screenshots of real applications by their sizes, requests and answers by their words.

A row becomes a drawing of that width and height with bars and words on it, a request and an answer of that many words.
A word is 1.4 tokens: of five words, two are written in two tokens.
"""

import csv
import json
import random
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ds_moe.data.processor import Processor
from ds_moe.models.processor import CHAT_TEMPLATE, Qwen3VLProcessor, tiny_processor

SCREENS = Path(__file__).with_name("screens.csv")
PATCHES = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
PIXELS = {"shortest_edge": 65_536, "longest_edge": 16_777_216}  # Qwen3-VL's least and most of a resized image
SHORT = "open save file edit view menu page list name date user next back find help move".split()  # a token each
LONG = [first + second for first in ("open", "edit", "view", "menu") for second in SHORT[6:]]  # two tokens each
TOKENS_A_WORD = 1.4


class Screen(NamedTuple):
    """A row of `screens.csv`: pixels and words."""

    width: int
    height: int
    request_words: int
    answer_words: int


def read_screens(file: Path = SCREENS) -> list[Screen]:
    with file.open(newline="") as rows:
        return [Screen(*map(int, row.values())) for row in csv.DictReader(rows)]


def drawn(screens: list[Screen], count: int, seed: int) -> list[Screen]:
    """`count` of them in a random order, evenly spaced when all are sorted by size: as large and as small as all."""
    by_size = sorted(screens, key=lambda screen: screen.width * screen.height)
    chosen = [by_size[int((number + 0.5) * len(screens) / count)] for number in range(count)]
    random.Random(seed).shuffle(chosen)
    return chosen


def build_processor() -> Processor:
    """Qwen3-VL's image processor with a byte-level vocabulary for the words of these records."""
    texts = tuple(f" {word}" for word in SHORT) * 8 + tuple(SHORT)
    half = [0.5, 0.5, 0.5]
    images = Qwen2VLImageProcessorPil(size=dict(PIXELS), image_mean=half, image_std=half, **PATCHES)
    processor = Qwen3VLProcessor(images, tiny_processor("vl", texts).tokenizer, chat_template=CHAT_TEMPLATE)
    processor.video_config = {"video_processor_type": "Qwen3VLVideoProcessor", **PATCHES}
    return processor


def write_records(screens: list[Screen], folder: Path, seed: int, form: str = "png") -> Path:
    """Images, PNG or JPEG, and records.jsonl, the same for a seed; returns the latter."""
    options = {"compress_level": 1} if form == "png" else {"quality": 90}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, screen in enumerate(screens):
        rng, name = random.Random(f"{seed} {number}"), f"images/{number:05d}.{form}"
        draw_screen(screen, rng).save(folder / name, **options)
        request = [{"type": "image", "image": name}, {"type": "text", "text": words(screen.request_words, rng)}]
        answer = words(max(screen.answer_words, 1), rng)  # 21 rows have none, and an empty answer is refused
        turns = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}))
    file = folder / "records.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def words(count: int, rng: random.Random) -> str:
    """So many words, which are `TOKENS_A_WORD` times as many tokens, rounded."""
    long = round(count * TOKENS_A_WORD) - count
    chosen = rng.choices(LONG, k=long) + rng.choices(SHORT, k=count - long)
    rng.shuffle(chosen)
    return "".join(f" {word}" for word in chosen)


def draw_screen(screen: Screen, rng: random.Random) -> Image.Image:
    """A picture of that size: a title bar, lines of words, boxes."""
    size = screen.width, screen.height
    shade = rng.randrange(200, 256)
    image = Image.new("RGB", size, (shade, shade, 255 - shade // 8))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, screen.width, 18), fill=(40, rng.randrange(60, 140), 160))
    for top in range(24, screen.height, 16):
        if rng.random() < 0.2:
            left = rng.randrange(max(screen.width // 2, 1))
            pen.rectangle((left, top, left + screen.width // 3, top + 10), fill=(rng.randrange(256), 120, 90))
        else:
            pen.text((6, top), words(max(screen.width // 40, 1), rng), fill=(20, 20, 20))
    return image
