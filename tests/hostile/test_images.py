"""Images: bombs, broken files, pixels without a known range, paths that leave the data root. None is ever executed."""

import base64
import io
import json
import os
import pickle
import struct
import zlib
from itertools import islice

import numpy as np
import pytest
from PIL import Image, ImageChops

from ds_moe.data.images import ImageSource, RecordError, load_image

from .conftest import line
from .limits import refusal

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
NOISE = Image.effect_noise((64, 64), 90).convert("RGB")
MUCH = zlib.compress(bytes(300_000_000))  # 300 MB in 0.3


def encoded(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def png(width: int, height: int, pixels: bytes = b"", chunk: bytes = b"", data: bytes = b"") -> bytes:
    """A PNG whose header says RGB of this size; `chunk` with `data` stands before the compressed `pixels`."""

    def made(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = made(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [header, made(chunk, data) if chunk else b"", made(b"IDAT", zlib.compress(pixels)), made(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(**tags: int) -> bytes:
    """A gray TIFF of 16 x 16 pixels and a little compressed data, with these tags set otherwise."""
    numbers = {"width": 256, "height": 257, "bits": 258, "compression": 259, "photometric": 262, "offset": 273}
    numbers |= {"samples": 277, "rows": 278, "bytes": 279, "tile_width": 322, "tile_height": 323, "tile_offset": 324}
    values = {"width": 16, "height": 16, "bits": 8, "compression": 8, "photometric": 1, "samples": 1, **tags}
    entries = [struct.pack("<HHII", numbers[name], 4, 1, values[name]) for name in sorted(values, key=numbers.get)]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    return head.ljust(200, b"\0") + zlib.compress(bytes(4000))


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def gif(screen: int, frame: int) -> bytes:
    sizes = struct.pack("<HH", screen, screen), struct.pack("<HHHH", 0, 0, frame, frame)
    return b"GIF89a" + sizes[0] + b"\0\0\0," + sizes[1] + b"\0\x02\x02\x44\x01\0;"


def webp(side: int) -> bytes:
    """The head of an animation on a canvas of this size."""
    canvas = b"\x02\0\0\0" + (side - 1).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", 44) + b"WEBPVP8X" + struct.pack("<I", 10) + canvas + b"ANIM\x06" + bytes(9)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n(canary) (w) file closefile\nshowpage\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script href="file:///canary"/><image href="http://host/a"/></svg>'
UNREADABLE = "is not an image that can be read (use one of PNG, JPEG"
BOMB = "could be decompression bomb DOS attack"
BEYOND = "beyond data.max_pixels 1000000 (shrink it"
# file name -> (content, what its error says)
IMAGES = {
    "declares-60000x60000.png": (png(60000, 60000), BOMB),
    "declares-9000x9000.png": (png(9000, 9000), "is 9000x9000, " + BEYOND),
    "declares-2-billion.png": (png(2**31 - 1, 2**31 - 1), BOMB),
    "no-width.png": (png(0, 16), UNREADABLE),
    "bomb-in-a-text.png": (png(16, 16, bytes(784), b"zTXt", b"a\0\0" + MUCH), "too large"),
    "bomb-in-a-profile.png": (png(16, 16, bytes(784), b"iCCP", b"a\0\0" + MUCH), "too large"),
    "huge-tile.tiff": (
        tiff(tile_width=40000, tile_height=40000, tile_offset=200, bytes=20),
        "has tiles of 40000x40000, " + BEYOND.replace("shrink it", "save it in strips"),
    ),
    "endless-strip.tiff": (tiff(offset=200, rows=2**32 - 1, bytes=2**32 - 1), "truncated image"),
    "many-samples.tiff": (tiff(offset=200, rows=16, bytes=20, samples=60000), UNREADABLE),
    "tall.tiff": (tiff(offset=200, rows=16, bytes=20, height=2**31 - 1), BOMB),
    "wide.bmp": (bmp(2**31 - 1, 16), BOMB),
    "no-pixels.bmp": (bmp(64, 64), "truncated image"),
    "large-frame.gif": (gif(1, 65535), BOMB),
    "large-screen.gif": (gif(65535, 1), BOMB),
    "large-canvas.webp": (webp(2**14), BOMB),
    "huge.ppm": (b"P6\n60000 60000\n255\n", BOMB),
    "endless-comment.ppm": (b"P6\n#" + b"x" * 10**7, "cannot be opened: a PPM header without a size"),
    "endless-comments.ppm": (b"P6\n" + b"#\n" * 10**7, "cannot be opened: a PPM header without a size"),
    "endless-blanks.ppm": (b"P6" + b" " * 10**7, "cannot be opened: a PPM header without a size"),
    "cut.png": (encoded(NOISE, "PNG")[:-300], "truncated image"),
    "cut.jpg": (encoded(NOISE, "JPEG")[:-300], "truncated image"),
    "cut.webp": (encoded(NOISE, "WEBP", lossless=True)[:-300], "cannot be opened"),
    "cut.gif": (encoded(NOISE, "GIF")[:-2000], "truncated image"),
    "cut.tiff": (encoded(NOISE, "TIFF")[:-300], "truncated image"),
    "only-a-header.png": (b"\x89PNG\r\n\x1a\n", UNREADABLE),
    "empty.png": (b"", UNREADABLE),
    "text.png": (b"not an image\n", UNREADABLE),
    "page.png": (b"<html><body>404</body></html>", UNREADABLE),
    "pickle.png": (pickle.dumps({"image": 1}), UNREADABLE),
    "script.svg": (SVG, UNREADABLE),
    "program.eps": (EPS, UNREADABLE),
    "program.png": (EPS, UNREADABLE),
    "program.pdf": (b"%PDF-1.4\n", UNREADABLE),
    "film.mp4": (b"\0\0\0\x20ftypisom" + bytes(100), UNREADABLE),
    "integers.tiff": (encoded(Image.new("I", (16, 16)), "TIFF"), "has pixels of mode I, whose range is not known"),
    "floats.tiff": (encoded(Image.new("F", (16, 16)), "TIFF"), "has pixels of mode F, whose range is not known"),
    "thin.png": (encoded(Image.new("RGB", (1, 4000)), "PNG"), "is refused by the model's processor"),
    "thin.gif": (encoded(Image.new("RGB", (4000, 1)), "GIF"), "is refused by the model's processor"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_hostile_image_is_named(stream, folder, name):
    content, says = IMAGES[name]
    (folder / name).write_bytes(content)
    (folder / "train.jsonl").write_bytes(line(name))
    message = refusal(lambda: next(iter(stream(folder / "train.jsonl"))), f"{folder}/train.jsonl:1: ", says)
    assert name in message or "processor" in message


def test_all_of_them_are_skipped_and_listed_by_a_loading_process(stream, folder, tmp_path):
    for name, (content, _) in IMAGES.items():
        (folder / name).write_bytes(content)
    (folder / "train.jsonl").write_bytes(b"\n".join([*map(line, IMAGES), line("good.png")]))
    made = stream(folder / "train.jsonl", batch=len(IMAGES) + 1, num_workers=1, on_bad_record="skip")
    [[batch]] = islice(made, 1)
    assert int(batch.real_B.sum()) == 1
    assert sorted(int(bad.where.rpartition(":")[2]) for bad in made.skipped) == list(range(1, len(IMAGES) + 1))
    listed = [json.loads(line) for line in (tmp_path / "run/bad_records.jsonl").read_text().splitlines()]
    assert len(listed) == len(IMAGES) and all("\n" not in one["reason"] for one in listed)


# name -> (path in the record, what the error says)
OUTSIDE = "leaves the data root"
PATHS = {
    "up": ("../secret.png", OUTSIDE),
    "down and up": ("deep/../../secret.png", OUTSIDE),
    "absolute": ("{outside}/secret.png", OUTSIDE),
    "a system file": ("/etc/passwd", OUTSIDE),
    "a process file": ("/proc/self/environ", OUTSIDE),
    "a device": ("/dev/zero", OUTSIDE),
    "a link to a file outside": ("link.png", OUTSIDE),
    "a link to a folder outside": ("folder/secret.png", OUTSIDE),
    "a link to a device": ("zero.png", OUTSIDE),
    "a sibling with the root's name in front": ("../data2/secret.png", OUTSIDE),
    "file URL": ("file:///etc/passwd", "is a URL (download it below the data root)"),
    "http URL": ("http://169.254.169.254/latest", "is a URL"),
    "data URI": ("data:image/png;base64," + base64.b64encode(bytes(10**6)).decode(), "is a URL"),
    "a pipe": ("pipe.png", "missing image 'pipe.png'"),
    "a folder": (".", "missing image '.'"),
    "a link to itself": ("loop.png", "missing image 'loop.png'"),
    "a NUL byte": ("good.png\0.txt", "missing image 'good.png\\x00.txt'"),
    "a line break": ("good\n.png", "missing image 'good\\n.png'"),
    "a home folder": ("~/a.png", "missing image '~/a.png'"),
    "a variable": ("$HOME/a.png", "missing image '$HOME/a.png'"),
    "a command": ("|touch canary", "missing image '|touch canary'"),
    "5,000 folders": ("a/" * 5000, "missing image 'a/a/"),
    "empty": ("", "an image is '', not a path"),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_hostile_path_is_refused(stream, folder, tmp_path, name):
    (tmp_path / "data2").mkdir()
    links = {"link.png": tmp_path / "secret.png", "folder": tmp_path, "zero.png": "/dev/zero", "loop.png": "loop.png"}
    for link, target in links.items():
        (folder / link).symlink_to(target)
    os.mkfifo(folder / "pipe.png")
    path, says = PATHS[name]
    (folder / "train.jsonl").write_bytes(line(path.format(outside=tmp_path)))
    refusal(lambda: stream(folder / "train.jsonl"), f"{folder}/train.jsonl:1: ", says)


RAMP = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)  # every gray value, in 16 bits
GRAY = Image.fromarray((RAMP >> 8).astype(np.uint8))
ODD = {
    "16 bits, PNG": encoded(Image.fromarray(RAMP), "PNG"),
    "16 bits, TIFF": encoded(Image.fromarray(RAMP), "TIFF"),
    "a PNG called .jpg": encoded(GRAY, "PNG"),
    "palette": encoded(GRAY.convert("P"), "PNG"),
    "with alpha": encoded(GRAY.convert("LA"), "PNG"),
    "first of two frames": encoded(GRAY, "PNG", save_all=True, append_images=[Image.new("L", (16, 16))]),
    "CMYK": encoded(Image.merge("CMYK", [ImageChops.invert(GRAY)] * 3 + [Image.new("L", (16, 16))]), "TIFF"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_but_good_images_show_what_they_hold(name):
    """Positive control: every gray value from 0 to 255 is there, however it is stored."""
    image = load_image(ImageSource("odd.jpg", data=ODD[name]), 256)
    assert np.array_equal(np.asarray(image), np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3))


def test_a_small_image_in_a_usual_tile_is_read():
    data = encoded(Image.new("L", (256, 256), 7), "TIFF", tile=(256, 256))
    assert load_image(ImageSource("tile.tiff", data=data), 2**16).getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_whatever_a_byte_is_changed_to_the_record_alone_is_bad(form):
    """600 images of each format, one to eight bytes of each changed: every one decodes or is one clear line."""
    random = np.random.default_rng(0)
    whole = np.frombuffer(encoded(NOISE.resize((24, 24)), form), dtype=np.uint8)
    refused = 0
    for _ in range(600):
        broken = whole.copy()
        places = random.integers(len(whole) if random.random() < 0.5 else 64, size=random.integers(1, 9))
        broken[places] = random.choice([0, 1, 127, 128, 255], size=len(places))
        try:
            load_image(ImageSource("x", data=broken.tobytes()[: random.integers(8, 2 * len(whole))]), 2**20)
        except RecordError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 0 < refused < 600
