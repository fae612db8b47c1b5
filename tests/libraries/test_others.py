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


def test_yaml_reads_an_exponent_without_a_point_as_text_and_the_last_of_equal_keys():
    """Guards: config/yaml_lines.py reads numbers as people write them, and `compose_lines` refuses equal keys."""
    assert yaml.safe_load("lr: 1e-4\nsteps: 1\nsteps: 2") == {"lr": "1e-4", "steps": 2}


def test_rich_wraps_lines_and_takes_brackets_for_styles():
    """Guards: `Lines.say`, `Bar.say` and `print_table` of monitor/progress.py."""
    console = Console(file=io.StringIO(), width=20)
    console.print("runs/[green]/a path that is long")
    assert console.file.getvalue().splitlines()[0] == "runs//a path that is"
