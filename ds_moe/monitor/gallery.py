"""Evaluated samples as one picture: image, question, prediction, and the expected answer where they differ."""

import functools
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ds_moe.monitor.heatmap import FAINT, INK
from ds_moe.monitor.reports import ShownSample

# Blue and vermilion of Okabe & Ito, which people with any common colour blindness can tell apart.
RIGHT, WRONG = "#0072B2", "#D55E00"
_COLUMN, _ROW, _HEAD = 2.5, 3.5, 0.5  # inches


def sample_gallery(samples: Sequence[ShownSample], caption: str) -> np.ndarray:
    """Draw one sample or more as uint8 (height, width, 3). The picture is narrow, as TensorBoard's cards are."""
    columns = min(len(samples), 2 if len(samples) <= 4 else 3)
    rows = -(-len(samples) // columns)
    width, height = max(_COLUMN * columns, 3.4), _HEAD + _ROW * rows
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    side = _COLUMN - 0.35
    for i, sample in enumerate(samples):
        row, column = divmod(i, columns)
        x, y = 0.18 + column * _COLUMN, height - _HEAD - row * _ROW - side
        _draw_sample(figure.add_axes((x / width, y / height, side / width, side / height)), sample)
    figure.text(0.18 / width, 1 - 0.25 / height, caption, fontsize=10.5, color=INK, va="center")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # matplotlib draws a box for such a letter
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_sample(axes: Axes, sample: ShownSample) -> None:
    axes.set(xticks=[], yticks=[], anchor="S")
    axes.spines[:].set_color("#BBBBBB")
    if sample.image is None:
        axes.set(facecolor="#F2F2F2")
        axes.text(0.5, 0.5, "text only", ha="center", va="center", fontsize=9, color=FAINT)
    else:
        small = sample.image.convert("RGB")
        small.thumbnail((320, 320))  # a photograph may have many millions of pixels, which would be slow to draw
        axes.imshow(np.asarray(small), interpolation="nearest")
    right = sample.prediction.strip() == sample.answer.strip()
    verdict = f"{'right' if right else 'wrong'}: {sample.prediction.strip() or '(empty)'}"
    blocks = [
        (_wrapped(sample.question, 33, 3), INK, "normal"),
        (_wrapped(verdict, 30, 2), RIGHT if right else WRONG, "bold"),
    ]
    if not right:
        blocks.append((_wrapped(f"expected: {sample.answer.strip()}", 33, 2), FAINT, "normal"))
    below = 7.0  # points from the image's lower edge
    for lines, color, weight in blocks:
        how = {"va": "top", "fontsize": 8.5, "color": color, "weight": weight, "family": _font_families()}
        axes.annotate("\n".join(lines), (0, 0), (0, -below), "axes fraction", "offset points", parse_math=False, **how)
        below += 12.5 * len(lines) + 3


def _wrapped(text: str, width: int, most: int) -> list[str]:
    """Wrap a text into at most `most` lines of `width` characters; East Asian characters are twice as wide."""
    if any(unicodedata.east_asian_width(letter) in "WF" for letter in text):
        width //= 2
    return textwrap.wrap(text, width, max_lines=most, placeholder=" ...") or [""]


@functools.cache
def _font_families() -> list[str]:
    """DejaVu Sans, then any installed CJK fonts for the letters it lacks: questions come in any language."""
    installed = set(font_manager.get_font_names())
    cjk = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC")
    return ["DejaVu Sans", *(name for name in cjk if name in installed)]
