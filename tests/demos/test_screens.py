"""The screens of the gate's demo: what is asked, what is shown and what is right, and that nothing gives it away."""

import json
import random
from collections import Counter
from itertools import chain, combinations, product

import numpy as np
import pytest
from PIL import ImageColor

from ds_moe.data.chat import parse_record
from tools.demos.gate import screens as tool

TRAIN, HELD_OUT, BASE = 80, 40, 60
FILES = ["base", *(f"adapter-{name}" for name in tool.ADAPTERS), "routing-train", "routing-held_out"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, records of each file)."""
    out = tmp_path_factory.mktemp("screens")
    tool.write_screens(out, TRAIN, HELD_OUT, BASE, seed=3)
    lines = {name: (out / f"{name}.jsonl").read_text().splitlines() for name in FILES}
    return out, {name: [json.loads(line) for line in lines[name]] for name in FILES}


def text(record):
    return record["messages"][0]["content"][1]["text"]


def picture(record):
    return record["messages"][0]["content"][0]["image"]


def reply(record):
    return record["messages"][1]["content"]


def test_counts_and_balance(written):
    out, records = written
    assert {name: len(records[name]) for name in FILES} == {
        "base": BASE,
        **{f"adapter-{name}": TRAIN // 4 for name in tool.ADAPTERS},
        "routing-train": TRAIN,
        "routing-held_out": HELD_OUT,
    }
    assert len(list(out.glob("images/*.png"))) == TRAIN + HELD_OUT + BASE
    for split, count in (("train", TRAIN), ("held_out", HELD_OUT)):
        adapters = Counter(record["adapter"] for record in records[f"routing-{split}"])
        kinds = Counter(record["kind"] for record in records[f"routing-{split}"])
        assert set(adapters.values()) == {count // 4} and len(adapters) == 4
        assert set(kinds.values()) == {count // 8} and len(kinds) == 8


def test_adapter_files_hold_the_routing_records_without_the_label(written):
    _, records = written
    labelled = {picture(record): record for record in records["routing-train"]}
    for name in tool.ADAPTERS:
        for record in records[f"adapter-{name}"]:
            assert record | {"adapter": name} == labelled.pop(picture(record))
    assert not labelled
    order = [record["adapter"] for record in records["routing-train"]]
    assert order != sorted(order) and order != list(tool.ADAPTERS) * (TRAIN // 4), "shuffled"


def test_every_record_is_read(written):
    out, records = written
    known = set(tool.words())
    for record in chain(*records.values()):
        sample = parse_record(record, "here", out.resolve())
        assert (sample.last_question(), sample.answer, sample.kind) == (text(record), reply(record), record["kind"])
        assert {sample.last_question(), sample.answer} <= known
        image = sample.first_image()
        assert image is not None and image.size == (64, 64)


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    def write(name, seed):
        tool.write_screens(tmp_path / name, 8, 4, 12, seed)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}

    first = write("first", 5)
    assert first == write("second", 5)
    assert first != write("third", 6)


def test_held_out_wordings_are_new_and_their_words_are_not():
    for family in tool.VERBS:
        train, held_out = (set(tool.wordings(family, split)) for split in ("train", "held_out"))
        assert len(train) >= 60 and len(held_out) >= 60 and not train & held_out
        assert set(" ".join(held_out).split()) == set(" ".join(train).split())
    assert not set(tool.wordings("read", "train")) & set(tool.wordings("act", "train"))
    assert len(set(tool.words())) == len(tool.words())


def test_requests_do_not_tell_the_screen(written):
    _, records = written
    forbidden = {*tool.SCREENS, "day", "row", "field", "bar", "column", "entry", "date"}
    assert not forbidden & set(" ".join([*tool.wordings("read", "train"), *tool.wordings("act", "train")]).split())
    for name in ("routing-train", "routing-held_out"):
        for record in records[name]:
            assert text(record) in tool.wordings(record["kind"].split("-")[1], name.removeprefix("routing-"))


def test_held_out_looks_are_new_and_their_parts_are_not():
    train, held_out = (set(tool.looks(split)) for split in ("train", "held_out"))
    assert not {look[:2] for look in train} & {look[:2] for look in held_out}, "pairs of theme and layout"
    for part, choices in enumerate((tool.THEMES, tool.LAYOUTS, tool.FONTS)):
        assert {look[part] for look in held_out} == {look[part] for look in train} == set(range(len(choices)))


def test_screens_have_the_looks_of_their_split(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    draw, drawn = tool.draw_screen, []
    monkeypatch.setattr(tool, "draw_screen", lambda *shown: drawn.append(shown[2]) or draw(*shown))
    for split in ("train", "held_out"):
        drawn.clear()
        list(tool.routing_records(tmp_path, split, 40, random.Random(0)))
        assert len(drawn) == 40 and set(drawn) <= set(tool.looks(split))
    drawn.clear()
    list(tool.base_records(tmp_path, 40, random.Random(0)))
    assert len(drawn) == 40 and set(drawn) <= set(tool.looks("train"))


def test_the_base_sees_no_held_out_wording(written):
    _, records = written
    asked = {text(record).removeprefix("caption: ") for record in records["base"] if record["kind"] == "caption"}
    assert asked <= {*tool.NEUTRAL, *tool.wordings("read", "train"), *tool.wordings("act", "train")}
    assert Counter(record["kind"] for record in records["base"]) == {"caption": 50, "echo": 10}


def test_no_answer_is_shared():
    for one, other in combinations(tool.ANSWERS.values(), 2):
        assert not set(one) & set(other)
    assert all(len(answer.split()) <= 2 for answer in chain(*tool.ANSWERS.values()))


def test_neither_text_nor_screen_alone_finds_the_adapter(written):
    _, records = written
    held_out = records["routing-held_out"]

    def best(told):
        """Accuracy of the majority adapter, given what `told` says of a record."""
        counts = Counter((told(record), record["adapter"]) for record in held_out)
        return sum(max(counts[key, name] for name in tool.ADAPTERS) for key in {key for key, _ in counts}) / HELD_OUT

    assert best(lambda record: record["kind"].split("-")[1]) <= 0.55
    assert best(lambda record: record["kind"].split("-")[0]) <= 0.55
    assert best(lambda record: record["kind"]) == 1.0


def mark(image, look):
    """(64, 64) bool: the pixels of the accent."""
    accent = ImageColor.getrgb(tool.THEMES[look[0]].accent)
    return (np.asarray(image) == accent).all(axis=-1)


@pytest.mark.parametrize("screen", tool.SCREENS)
def test_the_mark_is_large_and_stands_at_its_place(screen):
    for number, look in enumerate([*tool.looks("train"), *tool.looks("held_out")][::7]):
        centres = {}
        for place in tool.PLACES[screen]:
            ys, xs = mark(tool.draw_screen(screen, place, look, random.Random(number)), look).nonzero()
            assert len(xs) >= 60 and min(np.ptp(xs), np.ptp(ys)) >= 7, (look, place)
            centres[place] = (xs.mean(), ys.mean())
        for (place, here), (other, there) in product(centres.items(), repeat=2):
            for axis in range(2):
                if place[axis] < other[axis]:
                    assert here[axis] + 8 <= there[axis], (look, place, other)


def test_captions_and_answers_follow_the_mark():
    assert tool.caption("calendar", (2, 1)) == "calendar column 3 row 2"
    assert tool.caption("list", (0, 2)) == "list row 3"
    assert tool.caption("chart", (1, 0)) == "chart column 2"
    day = tool.PLACES["calendar"].index((1, 2))
    assert [tool.ADAPTERS[name][1]["calendar"][day] for name in ("agenda", "pointer")] == ["tue", "tap b3"]
