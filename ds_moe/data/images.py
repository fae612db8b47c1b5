"""Images of a record: where their files may be, how large they may be, and whether they decode.

Nothing in a data file is trusted: no path may leave the data root (symlinks are resolved), the size of an image is read
from its header before any pixel is decoded, and only formats that PIL decodes in this process are opened.
"""

import io
import re
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import (  # noqa: F401  # they enter themselves in Image.OPEN
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from ds_moe.errors import one_line, shown

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
GRAY_16 = ("I;16", "I;16L", "I;16B", "I;16N")  # converting these to RGB, PIL would clip them at 255
# Modes whose pixels have a known range. PIL's F and I have none, and others (LAB) PIL cannot convert.
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", *GRAY_16)
TIFF_TILE = (322, 323)  # tags for the width and height of tiles, each of which PIL decodes whole
ORIENTATION = 0x0112  # a tag of EXIF
SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
PNG_CHUNKS = 10_000  # of a file that are looked at
HEAD = 4096  # bytes of a PPM file in which its size must stand
PREFIX = 16  # bytes by which PIL tells what a file may be
LARGE_TILE = 2**20  # pixels; a small image too may be stored as one tile of this size


class RecordError(Exception):
    """Says why one record cannot be trained on, with the fix in parentheses. The caller adds file and line."""


@dataclass(frozen=True)
class ImageSource:
    """One image of a record, not yet decoded: a file below the data root, or encoded bytes from a Parquet file."""

    name: str  # as the record writes it, for messages
    path: Path | None = None
    data: bytes | None = None


class ImageRoot(Protocol):
    """Where the images of a record are if that is no folder: an archive, a dataset of the hub."""

    def image(self, name: str) -> ImageSource:
        """The image that a record calls so. Raises `RecordError`."""
        ...


def image_source(value: object, root: Path | ImageRoot) -> ImageSource:
    """The image that a record names by a path, or by {"bytes": ..., "path": ...} as Parquet files do.

    Args:
        root: the data root, symlinks resolved, or what takes the place of a folder.

    Raises:
        RecordError: the path leaves the root, no file is there, or the value is of another type.
    """
    if isinstance(value, dict):
        unread = sorted(key for key in value if key not in ("bytes", "path") and value[key] is not None)
        if unread:
            raise RecordError(f"an image has {shown(unread[0])}, which is not read (write its path alone)")
        data = value.get("bytes")
        if isinstance(data, bytes):
            return ImageSource(name=str(value.get("path") or "embedded image"), data=data)
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise RecordError(f'an image is {shown(value)}, not a path (write "image": "folder/name.png")')
    if not isinstance(root, Path):
        _check_no_url(value, "image")
        return root.image(value)
    return ImageSource(name=value, path=file_below(value, root, "image"))


def file_below(value: str, root: Path, what: str) -> Path:
    """The file at a path of a record, links resolved. `what` it is, for messages.

    Raises:
        RecordError: the path is a URL or leaves the root, or no file is there.
    """
    _check_no_url(value, what)
    try:
        path = (root / value).resolve()
        found = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of symlinks, a null byte
        reason = error.strerror if isinstance(error, OSError) else error  # an OSError repeats the path
        raise RecordError(f"missing {what} {shown(value)}: {reason} (correct the path, or set data.root)") from error
    if not path.is_relative_to(root):
        raise RecordError(f"{what} {shown(value)} leaves the data root {root} (move it below, or set data.root)")
    if not found:
        raise RecordError(f"missing {what} {shown(value)} (no such file below the data root {root}; set data.root)")
    return path


def _check_no_url(value: str, what: str) -> None:
    if "://" in value or value.startswith("data:"):
        raise RecordError(f"{what} {shown(value)} is a URL (download it below the data root)")


def image_size(source: ImageSource, max_pixels: int) -> tuple[int, int]:
    """(width, height), from the header alone. Raises `RecordError` as `load_image` does, except for broken pixels."""
    with _opened(source, max_pixels) as image:
        return image.size


def shown_size(source: ImageSource) -> tuple[int, int]:
    """(width, height) once turned as the EXIF orientation says, from the header alone.

    Raises:
        RecordError: this is no image.
    """
    with _opened(source, sys.maxsize) as image:
        try:
            if image.format == "PNG" and "exif" not in image.info:
                image.info["exif"] = _late_exif(source)
            exif = Image.Image.getexif(image)  # that of a PNG file would decode the pixels
        except Exception as error:  # decoders may raise anything for hostile bytes
            raise RecordError(
                f"image {shown(source.name)} has broken EXIF: {one_line(error)} (save it again)"
            ) from error
        width, height = image.size
        sideways = exif.get(ORIENTATION) in SIDEWAYS and image.format != "TIFF"  # whose size PIL gives as turned
        return (height, width) if sideways else (width, height)


def load_image(source: ImageSource, max_pixels: int) -> Image.Image:
    """The image in RGB, turned as its EXIF orientation says, what is transparent over white as engines show it.

    Raises:
        RecordError: this is no image, it has more than `max_pixels` pixels, or it is truncated.
    """
    with _opened(source, max_pixels) as image:
        try:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _over_white(image)
        except Exception as error:  # decoders may raise anything for hostile bytes
            reason = f"truncated image {shown(source.name)}: {error} (replace the file)"
            raise RecordError(reason) from error


def _over_white(image: Image.Image) -> Image.Image:
    """In RGB: bit for bit what qwen-vl-utils, vLLM and transformers make of an RGBA image."""
    if image.mode in GRAY_16:
        gray = np.asarray(image)
        clear = gray == image.info.get("transparency", -1)  # a PNG may call one of the gray values transparent
        image = Image.fromarray(np.where(clear, 255, gray >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


@contextmanager
def _opened(source: ImageSource, max_pixels: int) -> Iterator[Image.Image]:
    with ExitStack() as opened:
        try:
            file = source.path.open("rb") if source.path is not None else io.BytesIO(source.data or b"")
            image = opened.enter_context(_identified(opened.enter_context(file)))
            problem = _problem(image, max_pixels)
        except Image.DecompressionBombError as error:
            raise RecordError(f"image {shown(source.name)}: {error} (shrink it)") from error
        except UnidentifiedImageError as error:
            reason = f"{shown(source.name)} is not an image that can be read (use one of {', '.join(FORMATS)})"
            raise RecordError(reason) from error
        except Exception as error:  # decoders may raise anything for hostile bytes
            raise RecordError(f"image {shown(source.name)} cannot be opened: {error} (replace the file)") from error
        if problem is not None:
            raise RecordError(f"image {shown(source.name)} {problem}")
        yield image


def _identified(file: BinaryIO) -> Image.Image:
    """What `Image.open` makes of the file, without its warning from 89 megapixels on: data.max_pixels is the limit
    here, and to ignore a warning is nothing that threads can do each for itself."""
    head = file.read(HEAD)
    _check_netpbm(head)
    for form in FORMATS:
        factory, accepts = Image.OPEN[form]
        with suppress(SyntaxError, IndexError, TypeError, struct.error):  # a file of another form
            if (accepted := accepts is None or accepts(head[:PREFIX])) and not isinstance(accepted, str):
                file.seek(0)
                image = factory(file, "")
                _check_bomb(image)
                return image
    raise UnidentifiedImageError


def _check_bomb(image: Image.Image) -> None:
    """Raise `Image.DecompressionBombError` as `Image.open` does."""
    pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if most is not None and pixels > 2 * most:
        text = (
            f"Image size ({pixels} pixels) exceeds limit of {2 * most} pixels, could be decompression bomb DOS attack."
        )
        raise Image.DecompressionBombError(text)


def _late_exif(source: ImageSource) -> bytes | None:
    """The EXIF data of a PNG file that has them behind its pixels, where PIL finds them only by decoding these."""
    with source.path.open("rb") if source.path is not None else io.BytesIO(source.data or b"") as file:
        file.seek(8)
        for _ in range(PNG_CHUNKS):
            head = file.read(8)
            if len(head) < 8:
                break
            size = int.from_bytes(head[:4], "big")
            if head[4:] == b"eXIf":
                return file.read(size)
            file.seek(size + 4, io.SEEK_CUR)  # its checksum, too
    return None


def _check_netpbm(head: bytes) -> None:
    """Raise `ValueError` for a PPM file without a size near its start, for which PIL would search byte by byte."""
    words = re.sub(rb"#[^\r\n]*", b"", head).split(maxsplit=3)
    if re.match(rb"P[1-7fFy]\s*(#|\s)", head) and len(words) < 3:
        raise ValueError(f"a PPM header without a size in its first {HEAD} bytes")


def _problem(image: Image.Image, max_pixels: int) -> str | None:
    """What is wrong with an image by its header alone, with the fix; None where nothing is."""
    width, height = image.size
    if width * height > max_pixels:
        return f"is {width}x{height}, beyond data.max_pixels {max_pixels} (shrink it, or raise the limit)"
    tile = [int(image.tag_v2.get(tag, 1)) for tag in TIFF_TILE] if image.format == "TIFF" else [1, 1]
    if tile[0] * tile[1] > max(max_pixels, LARGE_TILE):
        return f"has tiles of {tile[0]}x{tile[1]}, beyond data.max_pixels {max_pixels} (save it in strips)"
    if image.mode not in MODES:
        return f"has pixels of mode {image.mode}, whose range is not known (save it with 8 bits a channel)"
    return None
