"""Small clips for tests: frames by a formula, and files of them by PyAV."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from ds_moe.data.images import ImageSource
from ds_moe.data.videos import VideoSource


def drawn(frames: int, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    """(frames, height, width, 3) uint8: waves that move, and some noise; the same on every machine."""
    t, y, x, c = np.meshgrid(*map(np.arange, (frames, height, width, 3)), indexing="ij")
    noise = ((t * 7919 + y * 104729 + x * 1299709 + c * 15485863 + seed * 32452843) * 2654435761 >> 11) % 23
    return ((t * 37 + y * 5 + x * 3 + c * 80 + seed * 11) % 200 + noise).astype(np.uint8)


def grays(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames that can be told apart after lossy coding: number n is gray, of value 20 + 10 n."""
    return np.stack([np.full((height, width, 3), 20 + 10 * number, np.uint8) for number in range(frames)])


def png(frame: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "PNG")
    return stream.getvalue()


def listed(frames: np.ndarray, fps: float | None = None) -> VideoSource:
    """A list of images."""
    images = tuple(ImageSource(f"{number}.png", data=png(frame)) for number, frame in enumerate(frames))
    return VideoSource("list", frames=images, fps=fps)


def write_clip(
    path: Path,
    frames: np.ndarray,
    fps: int = 8,
    codec: str = "mpeg4",
    form: str = "yuv420p",
    times=None,
    change=lambda index, packet: packet,
    **options,
) -> Path:
    """Encode frames into a file, whose container its name tells. `times` of each, in 1/1000 s, make a variable
    rate; `change(index, packet)` is what is written of an encoded packet."""
    import av

    with av.open(str(path), "w", options={key: str(value) for key, value in options.items()}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], form
        if codec in ("mpeg4", "libx264"):
            stream.codec_context.bit_rate = 4_000_000
        if times is not None:
            from fractions import Fraction

            stream.codec_context.time_base = Fraction(1, 1000)
        packets = []
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], stream.codec_context.time_base
            packets += stream.encode(frame)
        for index, packet in enumerate(packets + stream.encode()):
            container.mux(change(index, packet))
    return path


def replaced(number: int, by):
    """A change of `write_clip`: packet `number` holds `by(its data)`."""

    def change(index, packet):
        if index != number:
            return packet
        import av

        other = av.Packet(by(bytes(packet)))
        other.stream, other.time_base = packet.stream, packet.time_base
        other.pts, other.dts = packet.pts, packet.dts
        return other

    return change


def write_sound(path: Path) -> Path:
    """A file without a picture."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac" if path.suffix == ".mp4" else "pcm_s16le", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        for resampled in av.AudioResampler(stream.format, stream.layout, 16000).resample(frame):
            container.mux(stream.encode(resampled))
        container.mux(stream.encode())
    return path
