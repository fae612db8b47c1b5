"""Encoded videos: which frames are taken of every container, and how they are shown."""

import struct

import numpy as np
import pytest

from ds_moe.config.sections import VideoConfig
from ds_moe.data.images import RecordError
from ds_moe.data.video_process import VideoProcess
from ds_moe.data.videos import VideoSource, frames_of, look
from tests.data.clips import drawn, grays, replaced, write_clip

pytest.importorskip("av", reason="PyAV is an extra: ds-moe[video]")
SETTINGS = VideoConfig()
LIMIT = 10**6
CONTAINERS = {
    "mp4": {"codec": "mpeg4"},
    "mov": {"codec": "libx264"},
    "webm": {"codec": "libvpx-vp9"},
    "mkv": {"codec": "libx264"},
    "avi": {"codec": "mpeg4"},
    "gif": {"codec": "gif", "form": "rgb8"},
}


def source(path):
    return VideoSource(path.name, path=path)


def taken(path, indices, settings=SETTINGS):
    video = source(path)
    return list(frames_of(video, look(video, settings, LIMIT), indices, settings, LIMIT))


def numbers(frames):
    """Which of `grays` these are."""
    return [round((float(frame.mean()) - 20) / 10) for frame in frames]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_frames_by_number(tmp_path, container, count):
    path = write_clip(tmp_path / f"a.{container}", grays(count), fps=10, **CONTAINERS[container])
    film = look(source(path), SETTINGS, LIMIT)
    assert (film.frames, film.height, film.width, film.chosen) == (count, 32, 48, False)
    assert film.fps == pytest.approx(10, rel=0.02)
    wanted = sorted({0, count // 2, count - 1})
    assert numbers(taken(path, wanted)) == wanted
    assert numbers(taken(path, list(range(count)))) == list(range(count))


def test_frames_that_are_not_shown_do_not_count(tmp_path):
    """An mp4 that begins behind its first frames, as one that a phone has cut, and a picture of VP8 to predict from."""
    data = bytearray(write_clip(tmp_path / "whole.mp4", grays(12), fps=10).read_bytes())
    [ticks] = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)
    at = data.index(b"elst") + 16  # where its one entry says at which time of the medium the video begins
    struct.pack_into(">i", data, at, struct.unpack_from(">i", data, at)[0] + 3 * ticks // 10)
    (tmp_path / "begins.mp4").write_bytes(data)
    begins = look(source(tmp_path / "begins.mp4"), SETTINGS, LIMIT)
    assert (begins.frames, numbers(taken(tmp_path / "begins.mp4", list(range(9))))) == (9, list(range(3, 12)))
    path = write_clip(tmp_path / "hides.webm", grays(6), codec="libvpx", change=_hide(2))
    assert look(source(path), SETTINGS, LIMIT).frames == 5
    assert numbers(taken(path, list(range(5)))) == [0, 1, 3, 4, 5]


def _hide(number):
    """A change that clears `show_frame` of a packet of VP8."""
    return replaced(number, lambda data: bytes([data[0] & ~16]) + data[1:])


def test_frames_are_those_of_pyav_and_bytes_of_parquet_the_same(tmp_path):
    import av

    path = write_clip(tmp_path / "a.mp4", drawn(6, 48, 64), codec="libx264")
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert all(map(np.array_equal, taken(path, range(6)), expected))
    embedded = VideoSource("a.mp4", data=path.read_bytes())
    found = frames_of(embedded, look(embedded, SETTINGS, LIMIT), [1, 4], SETTINGS, LIMIT)
    assert all(map(np.array_equal, found, [expected[1], expected[4]]))


def test_a_variable_rate_has_a_mean_one(tmp_path):
    """Frames at 0, 100, 200, 900 and 1000 ms: five in 1.1 s or so, by number as transformers takes them."""
    times = [0, 100, 200, 900, 1000]
    path = write_clip(tmp_path / "a.mkv", grays(5), codec="libx264", times=times)
    film = look(source(path), SETTINGS, LIMIT)
    assert film.frames == 5 and numbers(taken(path, [0, 3, 4])) == [0, 3, 4]
    assert 0 < film.fps <= 1000


@pytest.mark.parametrize(("degrees", "turns"), [(90, 3), (180, 2), (270, 1)])
def test_a_phone_s_turned_video_is_shown_upright(tmp_path, degrees, turns):
    """The matrix of a track turns by so many degrees clockwise, as phones write it."""
    plain = write_clip(tmp_path / "a.mp4", drawn(3, 32, 48), codec="libx264")
    flat = taken(plain, [0, 2])
    one, zero = struct.pack(">i", 65536), bytes(4)
    minus = struct.pack(">i", -65536)
    rows = {90: zero + one + zero + minus + zero + zero, 180: minus + zero + zero + zero + minus + zero}
    rows[270] = zero + minus + zero + one + zero + zero
    data = bytearray(plain.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # behind version, times, id, duration, layer, volume
    assert data[at : at + 24] == one + zero * 3 + one + zero
    data[at : at + 24] = rows[degrees]
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(data)
    film = look(source(turned), SETTINGS, LIMIT)
    assert (film.height, film.width) == ((48, 32) if degrees % 180 else (32, 48))
    assert all(map(np.array_equal, taken(turned, [0, 2]), [np.rot90(frame, turns) for frame in flat]))


def test_what_is_transparent_is_white(tmp_path):
    from PIL import Image

    images = [Image.new("RGBA", (32, 32), (0, 0, 0, 0)) for _ in range(3)]
    for number, image in enumerate(images):
        image.paste((200, 0, 0, 255), (0, 0, 8 * (number + 1), 32))
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100, disposal=2, loop=0)
    frames = taken(tmp_path / "a.gif", [0, 2])
    assert frames[0][:, :8, 1].max() == 0 and frames[0][:, 8:].min() == 255
    assert frames[1][:, :24, 1].max() == 0 and frames[1][:, 24:].min() == 255


def test_a_file_is_looked_at_once_until_it_changes(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", grays(4))
    asked = []
    real = VideoProcess.look
    monkeypatch.setattr(VideoProcess, "look", lambda self, *args: asked.append(args) or real(self, *args))
    assert look(source(path), SETTINGS, LIMIT) == look(source(path), SETTINGS, LIMIT) and len(asked) == 1
    write_clip(path, grays(9))
    assert look(source(path), SETTINGS, LIMIT).frames == 9 and len(asked) == 2


def test_limits_of_the_run_file(tmp_path):
    path = write_clip(tmp_path / "a.mp4", grays(20), fps=10)
    for settings, expected in {
        (("max_seconds", 1.5),): r"lasts 2 s, beyond data.video.max_seconds 1.5 \(cut it",
        (("max_gb", 1e-7),): r"bytes, beyond data.video.max_gb 1e-07 \(cut it",
    }.items():
        with pytest.raises(RecordError, match=expected):
            look(source(path), VideoConfig(**dict(settings)), LIMIT)
    with pytest.raises(RecordError, match=r"is 48x32, beyond data.max_pixels 1000 \(shrink it"):
        look(source(path), SETTINGS, 1000)


def test_bytes_for_which_there_is_no_memory_cost_their_record(tmp_path):
    decoder, good = VideoProcess(60.0, 2**28), write_clip(tmp_path / "a.mp4", grays(2)).read_bytes()
    try:
        for _ in range(2):
            assert decoder.look({"max_pixels": LIMIT}, good, "a")["frames"] == 2
            with pytest.raises(RecordError, match=r"^video 'b' cannot be decoded in data.video.memory_gb \(raise it"):
                decoder.look({"max_pixels": LIMIT}, bytes(2**28), "b")
    finally:
        decoder.close()


def test_memory_is_limited(tmp_path):
    path = write_clip(tmp_path / "a.mp4", drawn(2, 1024, 1024))
    with pytest.raises(RecordError, match=r"memory"):
        list(VideoProcess(60.0, 40 * 2**20).frames({"path": str(path), "max_pixels": 2**24}, None, "a", [0, 1]))
