"""Videos that are broken, lie about themselves or are none. Each is one line; none reaches beyond its folder."""

import io
import json
import os
import struct
import threading
from pathlib import Path

import pytest
from PIL import Image

from tests.data.clips import drawn, grays, replaced, write_clip, write_sound

from .limits import refusal

pytest.importorskip("av", reason="PyAV is an extra: ds-moe[video]")
UNREADABLE = "is not a video that can be read (use mp4, mov, mkv, webm, gif or avi)"


def mp4(tmp_path, **options) -> bytes:
    """A good clip whose index stands before its pixels."""
    path = write_clip(tmp_path / "made.mp4", drawn(12), movflags="faststart", **options)
    return path.read_bytes()


def changed(data: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    """With `value` so many bytes behind the name of a box."""
    at = data.index(box) + len(box) + offset
    return data[:at] + value + data[at + len(value) :]


def timescale(data: bytes, ticks: int) -> bytes:
    """With so many ticks a second."""
    return changed(data, b"mdhd", 12, struct.pack(">I", ticks))


def raw(folder) -> bytes:
    return write_clip(folder / "raw.avi", grays(3), codec="rawvideo", form="bgr24").read_bytes()


def gif(frames: int, width: int = 16) -> bytes:
    stream = io.BytesIO()
    images = [Image.new("RGB", (width, 16), (number % 256, 0, 0)) for number in range(frames)]
    images[0].save(stream, "GIF", save_all=True, append_images=images[1:], duration=100)
    return stream.getvalue()


# name of a file -> (its content, made from a good clip; what its error says)
FILES = {
    "empty.mp4": (lambda good, _: b"", "is empty (replace the file)"),
    "text.mp4": (lambda good, _: b"not a video\n" * 9, UNREADABLE),
    "page.webm": (lambda good, _: b"<html><body>404</body></html>", UNREADABLE),
    "list.mp4": (lambda good, _: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", UNREADABLE),
    "concat.mp4": (lambda good, _: b"ffconcat version 1.0\nfile 'good.mp4'\n", UNREADABLE),
    "picture.mp4": (lambda good, _: b"\x89PNG\r\n\x1a\n" + bytes(99), UNREADABLE),
    "only-a-head.mp4": (lambda good, _: good[:32], "cannot be decoded"),
    "no-index.mp4": (lambda good, _: good[:200], "has no video stream: it is sound alone, or damaged (remove it)"),
    "cut.mp4": (lambda good, _: good[: int(len(good) * 0.7)], "(it is cut off: write it again)"),
    "no-pixels.mp4": (lambda good, _: good[: good.index(b"mdat") + 4], "has no frame that can be decoded"),
    "declares-60000x60000.avi": (
        lambda good, folder: changed(raw(folder), b"strf", 8, struct.pack("<ii", 60000, 60000)),
        "cannot be decoded: Invalid data found",
    ),
    "no-time.mp4": (lambda good, _: timescale(good, 0), "beyond data.video.max_seconds 2 (cut it"),
    "no-camera.mp4": (lambda good, _: timescale(good, 2**31 - 1), "frames a second (write it again with its frame"),
    "sound.mp4": (
        lambda good, folder: write_sound(folder / "s.mp4").read_bytes(),
        "has no video stream: it is sound alone",
    ),
    "no-frames.mkv": (
        lambda good, folder: write_clip(folder / "n.mkv", grays(1)).read_bytes().split(b"\x1f\x43\xb6\x75")[0],
        "cannot be decoded: End of file (write it again)",
    ),
    "long.gif": (lambda good, _: gif(30), "lasts 3 s, beyond data.video.max_seconds 2"),
    "wide.gif": (lambda good, _: gif(2, 40000), "is 40000x16, beyond data.max_pixels 100000"),
    "garbage.avi": (lambda good, _: b"RIFF\xff\xff\xff\xffAVI " + bytes(range(256)) * 40, "has no video stream"),
    "garbage.mkv": (lambda good, _: b"\x1aE\xdf\xa3" + bytes(range(256)) * 40, "cannot be decoded"),
    "garbage.gif": (lambda good, _: b"GIF89a" + bytes(range(256)) * 40, "is 256x770, beyond data.max_pixels 100000"),
}


def line(*videos: object) -> bytes:
    turns = [{"role": "user", "content": "<video>" * len(videos) + "?"}, {"role": "assistant", "content": "a"}]
    return json.dumps({"messages": turns, "videos": videos}).encode() + b"\n"


@pytest.fixture
def run(folder, stream):
    """run(videos...) reads a file of one record with them, as a training run does."""

    def read(*videos):
        (folder / "train.jsonl").write_bytes(line(*videos))
        limits = {"max_seconds": 2.0, "timeout_s": 60.0}
        return next(iter(stream(folder / "train.jsonl", max_pixels=10**5, video=limits)))

    return read


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_video_is_named(run, folder, tmp_path, name):
    make, expected = FILES[name]
    (folder / name).write_bytes(make(mp4(tmp_path), tmp_path))
    refusal(lambda: run(name), f"train.jsonl:1: video '{name}' ", expected)


def test_a_good_one_is_read(run, folder, tmp_path):
    (folder / "good.mp4").write_bytes(mp4(tmp_path))
    assert len(run("good.mp4")) == 1


def test_paths_that_lead_nowhere_or_out(run, folder, tmp_path):
    outside = tmp_path / "secret.mp4"
    outside.write_bytes(mp4(tmp_path))
    (folder / "link.mp4").symlink_to(outside)
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "clips").mkdir()
    for video, expected in {
        "../secret.mp4": "leaves the data root",
        str(outside): "leaves the data root",
        "link.mp4": "leaves the data root",
        "loop.mp4": "missing video 'loop.mp4'",
        "pipe.mp4": "missing video 'pipe.mp4' (no such file",
        "clips": "missing video 'clips' (no such file",
        "gone.mp4": "missing video 'gone.mp4' (no such file",
        "a\0.mp4": "missing video",
        "file:good.mp4": "missing video",
        "concat:good.mp4|good.mp4": "missing video",
        "http://a.b/c.mp4": "is a URL",
    }.items():
        refusal(lambda: run(video), "train.jsonl:1: ", expected)  # noqa: B023 (called at once)


def test_a_file_that_names_another_one(run, folder, tmp_path):
    """A QuickTime file may say that its pixels are in another file, which is not opened."""
    pipe, opened = tmp_path / "pipe", threading.Event()
    os.mkfifo(pipe)

    def wait():  # a pipe is opened for writing as soon as somebody opens it to read
        pipe.open("wb").close()
        opened.set()

    threading.Thread(target=wait, daemon=True).start()
    (folder / "refers.mp4").write_bytes(referring(write_clip(tmp_path / "made.mp4", drawn(12)).read_bytes(), pipe))
    try:
        refusal(
            lambda: run("refers.mp4"),
            "train.jsonl:1: video 'refers.mp4' ",
            "has no frame that can be decoded (remove it)",
        )
        assert not opened.is_set()
    finally:
        os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))
    assert opened.wait(10)


def referring(data: bytes, to: Path) -> bytes:
    """An mp4 whose index stands at its end, with an alias record in place of its reference to itself."""
    name = os.fsencode(to)
    name += bytes(len(name) % 2)
    alias = bytes(150) + struct.pack(">HH", 2, len(name)) + name + b"\xff\xff\0\0"  # 2: a path from the root
    box = struct.pack(">I", 12 + len(alias)) + b"alis" + bytes(4) + alias
    old = struct.pack(">I", 12) + b"url \0\0\0\1"
    for outer in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        at = data.index(outer) - 4
        [size] = struct.unpack_from(">I", data, at)
        data = data[:at] + struct.pack(">I", size + len(box) - len(old)) + data[at + 4 :]
    assert data.count(old) == 1
    return data.replace(old, box)


def test_lists_of_frames(run, folder):
    for number, size in enumerate(((16, 16), (24, 16))):
        Image.new("RGB", size).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:40])
    for frames, expected in (
        (["0.png", "1.png"], "frame '1.png' of a video is 24x16, its first 16x16"),
        (["0.png", "broken.png"], "train.jsonl:1: "),
        (["0.png", "../secret.png"], "leaves the data root"),
        (["0.png"] * 769, "has 769 frames, beyond data.video.max_frames 768"),
        ([["0.png"]], "an image is ['0.png'], not a path"),
    ):
        refusal(lambda: run(frames), expected)  # noqa: B023 (called at once)


def test_a_size_that_changes_on_the_way(run, folder):
    """Each frame of Motion JPEG has a head of its own."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 80)).save(stream, "JPEG")
    change = replaced(1, lambda data: stream.getvalue())
    write_clip(folder / "grows.avi", grays(4), codec="mjpeg", form="yuvj420p", change=change)
    expected = "has a frame of 64x80 behind one of 48x32 (write it in one size)"
    refusal(lambda: run("grows.avi"), "train.jsonl:1: video 'grows.avi' ", expected)
