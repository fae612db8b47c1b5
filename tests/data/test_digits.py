"""The digits: a fixed split by image, three kinds of questions, and the same as files."""

from collections import Counter

import pytest
from sklearn.datasets import load_digits

from ds_moe.data.digits import ANSWERS, QUESTIONS, DigitsRecords, digits_samples, write_digits
from ds_moe.data.records import open_records

TRAIN, HELD_OUT = digits_samples("train"), digits_samples("held-out")


def test_split_is_by_image_and_every_image_is_asked_all_kinds():
    train, held_out = ({sample.images[0].name for sample in split} for split in (TRAIN, HELD_OUT))
    assert (len(train), len(held_out)) == (1437, 360) and not train & held_out
    pixels = [{sample.images[0].data for sample in split} for split in (TRAIN, HELD_OUT)]
    assert not pixels[0] & pixels[1]
    asked = Counter((sample.images[0].name, sample.kind) for sample in TRAIN + HELD_OUT)
    assert len(asked) == 1797 * 3 and set(asked.values()) == {1}
    assert [sample.kind for sample in HELD_OUT[:3]] == list(QUESTIONS)


def test_answers_follow_the_scan_and_wordings_vary():
    labels = load_digits().target
    for sample in TRAIN + HELD_OUT:
        digit = int(labels[int(sample.images[0].name.removeprefix("digits/").removesuffix(".png"))])
        assert sample.answer == ANSWERS[sample.kind](digit)
        assert sample.last_question() in QUESTIONS[sample.kind]
    for split in (TRAIN, HELD_OUT):
        assert {sample.last_question() for sample in split} == {q for kind in QUESTIONS.values() for q in kind}


def test_images_are_the_scans():
    scan = load_digits().images[int(TRAIN[0].images[0].name[7:11])]
    image = TRAIN[0].first_image()
    assert image.size == (16, 16) and image.mode == "RGB"
    brightest = divmod(int(scan.argmax()), 8)
    small = image.convert("L").resize((8, 8))
    assert small.getpixel((brightest[1], brightest[0])) > 150 and small.getpixel((0, 0)) < 60


def test_records_are_the_same_in_every_process():
    """Pinned: a resumed demo must find the data that it stopped in."""
    assert DigitsRecords("train").sha256[:16] == "e217c787d337c259"
    assert DigitsRecords("held-out").sha256 != DigitsRecords("train").sha256


@pytest.mark.parametrize(("split", "which"), [("train", 0), ("held-out", 1)])
def test_written_files_read_back_as_the_same_samples(tmp_path, run_config, split, which):
    files = write_digits(tmp_path)
    records = open_records(str(files[which]), split, run_config(files[which]).data)
    assert len(records) == len(digits_samples(split)) and not records.bad
    for index in (0, 1, 100, len(records) - 1):
        read, made = records.sample(index), digits_samples(split)[index]
        assert (read.last_question(), read.answer, read.kind) == (made.last_question(), made.answer, made.kind)
        assert read.first_image().tobytes() == made.first_image().tobytes()
