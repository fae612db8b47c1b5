"""What smaller libraries do that a reader of their manuals would not expect. A failing test: a guard may go.

`docs/libraries.md` lists them all.
"""

import io

import numpy as np
import yaml
from PIL import Image
from rich.console import Console


def test_pillow_clips_16_bit_grey_at_255():
    """Guard: `GRAY_16` of data/images.py: their upper 8 bits are taken."""
    image = Image.fromarray(np.array([[300, 60_000]], dtype=np.uint16))
    assert image.mode == "I;16" and image.convert("RGB").tobytes() == bytes([255] * 6)


def test_pillow_shows_what_transparent_pixels_hide():
    """Guard: `_over_white` of data/images.py."""
    assert Image.new("RGBA", (1, 1), (255, 0, 0, 0)).convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_pillow_turns_the_size_of_a_tiff_alone_and_decodes_a_png_for_its_exif():
    """Guard: `shown_size` of data/images.py."""
    sideways = Image.Exif()
    sideways[0x0112] = 6
    sizes = {}
    for kind in ("TIFF", "JPEG", "PNG"):
        file = io.BytesIO()
        Image.new("RGB", (4, 2)).save(file, kind, **({} if kind == "PNG" else {"exif": sideways}))
        image = Image.open(file)
        sizes[kind] = image.size
        before = image.fp
        image.getexif()
        assert (image.fp is before) == (kind != "PNG")  # the file is let go of once its pixels are there
    assert sizes == {"TIFF": (2, 4), "JPEG": (4, 2), "PNG": (4, 2)}


def test_yaml_reads_an_exponent_without_a_point_as_text_and_the_last_of_equal_keys():
    """Guards: config/yaml_lines.py reads numbers as people write them, and `compose_lines` refuses equal keys."""
    assert yaml.safe_load("lr: 1e-4\nsteps: 1\nsteps: 2") == {"lr": "1e-4", "steps": 2}


def test_rich_wraps_lines_and_takes_brackets_for_styles():
    """Guards: `Lines.say`, `Bar.say` and `print_table` of monitor/progress.py."""
    console = Console(file=io.StringIO(), width=20)
    console.print("runs/[green]/a path that is long")
    assert console.file.getvalue().splitlines()[0] == "runs//a path that is"
