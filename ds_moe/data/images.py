"""Images of a record: where they may lie, how big they may be, and whether they decode.

Nothing of a data file is trusted: a path may not leave the data root (symlinks resolved), an image's size is read
from its header before a pixel is decoded, and only formats that are decoded in-process are opened.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class RecordError(Exception):
    """Why one record cannot be trained on, with the fix in parentheses; the caller adds file and line."""


@dataclass(frozen=True)
class ImageSource:
    """One image of a record, not yet decoded: a file below the data root, or encoded bytes from a Parquet file."""

    name: str  # as the record writes it, for messages
    path: Path | None = None
    data: bytes | None = None


def image_source(value: object, root: Path) -> ImageSource:
    """The image that a record's `value` names: a path, or {"bytes": ..., "path": ...} as Parquet files hold it.

    `root` is a resolved folder. Raises `RecordError` for a path that leaves it, a missing file or another type.
    """
    if isinstance(value, dict):
        data = value.get("bytes")
        if isinstance(data, bytes):
            return ImageSource(name=str(value.get("path") or "embedded image"), data=data)
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise RecordError(f'an image is {_shown(value)}, not a path (write "image": "folder/name.png")')
    if "://" in value or value.startswith("data:"):
        raise RecordError(f"image {_shown(value)} is a URL (download it below the data root)")
    try:
        path = (root / value).resolve()
        found = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of symlinks, a null byte
        raise RecordError(f"missing image {_shown(value)}: {error} (correct the path)") from error
    if not path.is_relative_to(root):
        raise RecordError(f"image {_shown(value)} leaves the data root {root} (move it below, or set data.root)")
    if not found:
        raise RecordError(f"missing image {_shown(value)} (no such file below the data root {root})")
    return ImageSource(name=value, path=path)


def image_size(source: ImageSource, max_pixels: int) -> tuple[int, int]:
    """(width, height) from the header alone. Raises `RecordError` as `load_image` does, save for broken pixels."""
    with _opened(source, max_pixels) as image:
        return image.size


def load_image(source: ImageSource, max_pixels: int) -> Image.Image:
    """The image in RGB, turned as its EXIF orientation says.

    Raises `RecordError` for what is no image, has more than `max_pixels` pixels, or is truncated.
    """
    with _opened(source, max_pixels) as image:
        try:
            image.load()
            turned = ImageOps.exif_transpose(image)
            return turned.convert("RGB")
        except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
            reason = f"truncated image {_shown(source.name)}: {error} (replace the file)"
            raise RecordError(reason) from error


def _opened(source: ImageSource, max_pixels: int) -> Image.Image:
    file = source.path if source.path is not None else io.BytesIO(source.data or b"")
    try:
        with warnings.catch_warnings():  # PIL warns from 89 megapixels on; data.max_pixels is this run's limit
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise RecordError(f"image {_shown(source.name)}: {error} (shrink it)") from error
    except UnidentifiedImageError as error:
        reason = f"{_shown(source.name)} is not an image that can be read (use one of {', '.join(FORMATS)})"
        raise RecordError(reason) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise RecordError(f"image {_shown(source.name)} cannot be opened: {error} (replace the file)") from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        reason = f"image {_shown(source.name)} is {width}x{height}, beyond data.max_pixels {max_pixels}"
        raise RecordError(f"{reason} (shrink it, or raise the limit)")
    return image


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
