"""Small application screens and requests about them: data for a gate that picks one of four LoRA adapters.

A calendar, list, form or chart of 64 x 64 pixels has one mark; a request reads what is marked, or acts on it, in words
that name no screen. Only both together say which adapter is right, and each answers in texts of its own.
- base.jsonl: kind "caption", the screen and the place of its mark, asked for in neutral words or as "caption:" before
  a request; and kind "echo", an adapter's answer to be repeated, which teaches a frozen output layer its tokens;
- adapter-NAME.jsonl, what that adapter learns: kinds "<screen>-<request>";
- routing-train.jsonl, all of these shuffled, and routing-held_out.jsonl: each record with its "adapter". Held-out
  records pair themes with layouts, and verbs with objects, that are never together in training.
"""

import json
import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
from PIL import Image, ImageDraw, ImageFont

Split = Literal["train", "held_out"]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, all four inside
Place = tuple[int, int]  # of a mark: column and row from 0; the rows of a list or a form have column 0, bars row 0
Look = tuple[int, int, int]  # indices of `THEMES`, `LAYOUTS` and `FONTS`


class Theme(NamedTuple):
    """Colours; nothing but the mark has the accent."""

    back: str
    panel: str
    faint: str
    ink: str
    accent: str


SIZE = 64  # pixels a side
LEAST = 47  # pixels a side of the panel; what a layout leaves beyond them moves and stretches it
THEMES = (
    Theme("#d9dce1", "#ffffff", "#b4b9c2", "#4a4f58", "#0a5fff"),
    Theme("#e6e6e6", "#fafafa", "#bdbdbd", "#505050", "#e0102a"),
    Theme("#cfd8cf", "#f4f8f2", "#aab8aa", "#46524a", "#008a3c"),
    Theme("#e3d8c4", "#fbf4e4", "#c4b598", "#5c5040", "#9a1fd0"),
    Theme("#15171b", "#262a31", "#555c68", "#b9c0cb", "#ff8a00"),
    Theme("#000000", "#1b1b1b", "#505050", "#b4b4b4", "#00d8ff"),
    Theme("#0c1830", "#182848", "#465a82", "#a9b8d6", "#ffdc00"),
    Theme("#1d1424", "#2d2138", "#5d4f6c", "#c0b2cf", "#ff3fa4"),
)
# Pixels taken at the left (a side bar), the top (a title), the right (a side bar) and the bottom (tools).
LAYOUTS = ((0, 0, 0, 0), (0, 9, 0, 0), (11, 0, 0, 0), (0, 0, 11, 0), (0, 0, 0, 9), (10, 8, 0, 0))
FONTS = ("", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")  # "": Pillow's own
TEXTS = ("Anna", "Ben", "Cleo", "Dan", "Eva", "Finn", "Mail", "Notes", "Tasks", "Rent", "Tea", "Team", "Trip", "Bank")

DAYS, ROWS, BARS = list(product(range(3), range(3))), [(0, row) for row in range(3)], [(bar, 0) for bar in range(3)]
PLACES: dict[str, list[Place]] = {"calendar": DAYS, "list": ROWS, "form": ROWS, "chart": BARS}
CELLS, KEYS = [f"{'abc'[column]}{row + 1}" for column, row in DAYS], ["key 1", "key 2", "key 3"]
ADAPTERS = {  # whose requests, and its answers to each place of its screens, in the order of `PLACES`
    "agenda": ("read", {"calendar": ["mon"] * 3 + ["tue"] * 3 + ["wed"] * 3, "list": ["first", "second", "third"]}),
    "pointer": ("act", {"calendar": [f"tap {day}" for day in CELLS], "list": ["tap 1", "tap 2", "tap 3"]}),
    "auditor": ("read", {"form": ["top", "middle", "bottom"], "chart": ["left", "centre", "right"]}),
    "operator": ("act", {"form": KEYS, "chart": KEYS}),
}
ANSWERS = {name: list(dict.fromkeys(chain(*replies.values()))) for name, (_, replies) in ADAPTERS.items()}
OPENERS, ENDINGS = ("", "ok,", "now,", "next,"), ("", "here", "on this screen", "in this view")
VERBS = {
    "read": ("what is", "which is", "tell me", "name", "read", "report"),
    "act": ("click", "tap", "press", "open", "touch", "go to"),
}
OBJECTS = [f"the {mark} {noun}" for mark in ("marked", "highlighted", "selected", "active") for noun in ("item", "one")]
NEUTRAL = ("describe the screen", "describe this view", "caption the screen", "say what this screen shows")


def in_split(first: int, second: int, split: Split) -> bool:
    """Whether two choices may stand together: a quarter of the pairs, no choice left out of either, is held out."""
    return ((first + second) % 4 == 3) == (split == "held_out")


@lru_cache
def looks(split: Split) -> tuple[Look, ...]:
    every = product(range(len(THEMES)), range(len(LAYOUTS)), range(len(FONTS)))
    return tuple(look for look in every if in_split(look[0], look[1], split))


@lru_cache
def wordings(family: str, split: Split) -> tuple[str, ...]:
    """All requests of "read" or "act" in a split: its pairs of verb and object, with every opener and ending."""
    pairs = product(enumerate(VERBS[family]), enumerate(OBJECTS))
    said = [f"{verb} {thing}" for (first, verb), (second, thing) in pairs if in_split(first, second, split)]
    return tuple(" ".join(filter(None, parts)) for parts in product(OPENERS, said, ENDINGS))


def caption(screen: str, place: Place) -> str:
    """What the base says of a screen, as "calendar column 3 row 2"."""
    column, row = (f" {name} {index + 1}" for name, index in zip(("column", "row"), place, strict=True))
    return screen + {"calendar": column + row, "chart": column}.get(screen, row)


def words() -> list[str]:
    """Every text that a record may hold, each once: what a tokenizer has to learn."""
    requests = [text for family in VERBS for text in wordings(family, "train") + wordings(family, "held_out")]
    captions = [caption(screen, place) for screen, places in PLACES.items() for place in places]
    asked, said = [f"caption: {text}" for text in requests], [*chain(*ANSWERS.values())]
    return [*NEUTRAL, *requests, *asked, *captions, *said, *(f"repeat: {text}" for text in said)]


class Pen(NamedTuple):
    draw: ImageDraw.ImageDraw
    theme: Theme
    font: int
    rng: random.Random

    def text(self, box: Box, text: str, fill: str, size: int = 8, anchor: str = "lm") -> None:
        """One line in a box, from its left ("lm") or in its middle ("mm"): as many letters as fit."""
        left, top, right, bottom = box
        font = _font(self.font, size)
        while text and self.draw.textlength(text, font) > right - left + 2:
            text = text[:-1]
        x = left if anchor == "lm" else (left + right + 1) / 2
        self.draw.text((x, (top + bottom + 1) / 2), text, fill, font, anchor)


@lru_cache
def _font(index: int, size: int) -> Any:
    if not FONTS[index]:
        return ImageFont.load_default(size)
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{FONTS[index]}.ttf", size)


def _thirds(first: int, last: int) -> list[tuple[int, int]]:
    """The pixels from `first` to `last` as three neighbouring spans, their ends inside."""
    edges = [first + round((last + 1 - first) * part / 3) for part in range(4)]
    return [(edges[part], edges[part + 1] - 1) for part in range(3)]


def draw_calendar(pen: Pen, panel: Box, place: Place) -> None:
    """Three weeks of Monday to Wednesday, ruled, below their initials; the marked day is filled."""
    columns, rows = _thirds(panel[0], panel[2]), _thirds(panel[1] + 9, panel[3])
    for (left, right), initial in zip(columns, "MTW", strict=True):
        pen.text((left, panel[1], right, panel[1] + 8), initial, pen.theme.ink, 9, "mm")
    start = pen.rng.randint(1, 14)
    for column, row in DAYS:
        day = (columns[column][0], rows[row][0], columns[column][1], rows[row][1])
        marked = (column, row) == place
        pen.draw.rectangle(day, pen.theme.accent if marked else None, pen.theme.ink)
        pen.text(day, str(start + column + 7 * row), pen.theme.panel if marked else pen.theme.ink, 8, "mm")


def draw_list(pen: Pen, panel: Box, place: Place) -> None:
    """Rows of a round or square icon and a text, with rules between; the marked row is filled from edge to edge."""
    left, right, side = panel[0] + 3, panel[2], pen.rng.randint(7, 9)
    icon = pen.rng.choice([pen.draw.ellipse, pen.draw.rectangle])
    for row, (top, bottom) in enumerate(_thirds(panel[1], panel[3])):
        ink = pen.theme.panel if (0, row) == place else pen.theme.ink
        if (0, row) == place:
            pen.draw.rectangle((panel[0], top, right, bottom), pen.theme.accent)
        elif row < 2:
            pen.draw.line((left, bottom, right - 2, bottom), pen.theme.faint)
        above = (top + bottom - side) // 2
        icon((left, above, left + side, above + side), ink)
        pen.text((left + side + 3, top, right - 1, bottom), pen.rng.choice(TEXTS), ink, 9)


def draw_form(pen: Pen, panel: Box, place: Place) -> None:
    """Rows of a small label, above or beside, and an empty or filled field; the marked field has a thick outline."""
    left, right, indent = panel[0] + 2, panel[2] - 2, pen.rng.choice([0, 13, 15])
    for row, (top, bottom) in enumerate(_thirds(panel[1], panel[3])):
        label, field = (left, top, right, top + 5), (left, top + 6, right, bottom)
        if indent:
            label, field = (left, top, left + indent - 3, bottom), (left + indent, top + 2, right, bottom - 2)
        pen.text(label, pen.rng.choice(TEXTS).lower(), pen.theme.ink, 6)
        pen.draw.rectangle(field, pen.theme.back, pen.theme.faint)
        if pen.rng.random() < 0.5:
            pen.text((field[0] + 4, *field[1:]), str(pen.rng.randint(10, 999)), pen.theme.ink, 7)
        if (0, row) == place:
            pen.draw.rectangle(field, None, pen.theme.accent, 3)


def draw_chart(pen: Pen, panel: Box, place: Place) -> None:
    """Bars of different heights and widths on axes, initials below; the marked bar is coloured."""
    left, top, right, floor = panel[0] + 5, panel[1] + 2, panel[2] - 1, panel[3] - 9
    for height in range(floor - 8, top, -8):
        pen.draw.line((left - 2, height, left, height), pen.theme.ink)
    pen.draw.line((left, top, left, floor, right, floor), pen.theme.ink)
    for column, (first, last) in enumerate(_thirds(left + 2, right)):
        height, width = pen.rng.randint(13, floor - top - 2), pen.rng.randint(8, last - first - 2)
        start = first + pen.rng.randint(1, last - first - width)
        fill = pen.theme.accent if (column, 0) == place else pen.theme.faint
        pen.draw.rectangle((start, floor - height, start + width, floor - 1), fill)
        pen.text((start, floor + 2, start + width, panel[3]), pen.rng.choice(TEXTS)[0], pen.theme.ink, 8, "mm")


SCREENS = {"calendar": draw_calendar, "list": draw_list, "form": draw_form, "chart": draw_chart}


def draw_screen(screen: str, place: Place, look: Look, rng: random.Random) -> Image.Image:
    """A screen with its mark at `place`; `rng` moves and stretches the panel and makes up the data."""
    theme, (left, title, right, tools) = THEMES[look[0]], LAYOUTS[look[1]]
    image = Image.new("RGB", (SIZE, SIZE), theme.back)
    pen = Pen(ImageDraw.Draw(image), theme, look[2], rng)
    if title:
        pen.draw.rectangle((0, 0, SIZE - 1, title - 1), theme.faint)
        pen.text((3, 0, SIZE - 4, title - 1), rng.choice(TEXTS), theme.ink, 7)
    if left or right:
        x = 0 if left else SIZE - right
        pen.draw.rectangle((x, title, x + left + right - 1, SIZE - 1), theme.faint)
        for y in range(title + rng.randint(3, 6), SIZE - 3, rng.randint(6, 9)):
            pen.draw.line((x + 2, y, x + rng.randint(5, 8), y), theme.ink)
    for x in range(rng.randint(2, 6), SIZE - 8, rng.randint(11, 15)) if tools else ():
        pen.draw.rectangle((x, SIZE - tools + 2, x + 6, SIZE - 3), theme.ink)
    width, height = rng.randint(LEAST, SIZE - left - right), rng.randint(LEAST, SIZE - title - tools)
    x, y = rng.randint(left, SIZE - right - width), rng.randint(title, SIZE - tools - height)
    pen.draw.rectangle((x, y, x + width - 1, y + height - 1), theme.panel)
    SCREENS[screen](pen, (x + 1, y + 1, x + width - 2, y + height - 2), place)
    return image


def base_records(out: Path, count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """One of six is an echo; of the others two are asked in neutral words and three in those of requests."""
    for number in range(count):
        screen = rng.choice(list(SCREENS))
        place = rng.choice(PLACES[screen])
        kind, text, reply = "caption", rng.choice(NEUTRAL), caption(screen, place)
        if number % 6 == 0:
            kind, reply = "echo", rng.choice(list(chain(*ANSWERS.values())))
            text = f"repeat: {reply}"
        elif number % 2:
            text = f"caption: {rng.choice(wordings(rng.choice(list(VERBS)), 'train'))}"
        image = draw_screen(screen, place, rng.choice(looks("train")), rng)
        yield _record(out, f"base-{number}", image, text, reply, kind)


def routing_records(out: Path, split: Split, count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Each adapter takes its turn in every four records, each of its two screens in every eight."""
    for number in range(count):
        adapter = list(ADAPTERS)[number % 4]
        family, replies = ADAPTERS[adapter]
        screen = list(replies)[number // 4 % 2]
        place, reply = rng.choice(list(zip(PLACES[screen], replies[screen], strict=True)))
        image, text = draw_screen(screen, place, rng.choice(looks(split)), rng), rng.choice(wordings(family, split))
        yield _record(out, f"{split}-{number}", image, text, reply, f"{screen}-{family}") | {"adapter": adapter}


def _record(out: Path, name: str, image: Image.Image, text: str, reply: str, kind: str) -> dict[str, Any]:
    image.save(out / f"images/{name}.png")
    content = [{"type": "image", "image": f"images/{name}.png"}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": reply}], "kind": kind}


def write_screens(out: Path, train: int, held_out: int, base: int, seed: int) -> None:
    """All files below `out`, with that many records: the same bytes for the same arguments."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    trained = list(routing_records(out, "train", train, random.Random(f"train {seed}")))
    files = {"base": list(base_records(out, base, random.Random(f"base {seed}")))}
    for adapter in ADAPTERS:
        own = [record for record in trained if record["adapter"] == adapter]
        files[f"adapter-{adapter}"] = [{key: record[key] for key in ("messages", "kind")} for record in own]
    files["routing-train"] = random.Random(f"order {seed}").sample(trained, train)
    files["routing-held_out"] = list(routing_records(out, "held_out", held_out, random.Random(f"held out {seed}")))
    for name, records in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
