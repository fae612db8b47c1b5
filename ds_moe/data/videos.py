"""Videos of a record: encoded files or lists of frames, how large they may be, and which of their frames are taken.

Nothing of a file is trusted. It lies below the data root, and is opened in another process (`video_process.py`), which
also tells how many frames it has; from that alone follows how many tokens it becomes, before it is decoded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ds_moe.config.sections import VideoConfig
from ds_moe.data.images import ImageRoot, ImageSource, RecordError, file_below, image_source, load_image, shown_size
from ds_moe.data.video_process import VideoProcess, video_process
from ds_moe.errors import shown

GIB = 2**30
KEPT = 4096  # files whose number of frames is remembered


@dataclass(frozen=True)
class VideoSource:
    """One video of a record, not yet decoded: a file below the data root, encoded bytes, or images as its frames.

    Attributes:
        name: as the record writes it, for messages.
        fps: frames a second of `frames`, as the record says; None: as many as the model takes of a file.
    """

    name: str
    path: Path | None = None
    data: bytes | None = None
    frames: tuple[ImageSource, ...] = ()
    fps: float | None = None


@dataclass(frozen=True)
class Film:
    """What a video is before any of its frames is chosen.

    Attributes:
        frames: their number.
        fps: a second; None: nobody tells.
        height, width: in pixels, as shown.
        chosen: whether somebody has chosen the frames already, so that all are taken.
    """

    frames: int
    fps: float | None
    height: int
    width: int
    chosen: bool = False


@dataclass(frozen=True)
class VideoPlan:
    """What becomes of a video.

    Attributes:
        indices: its frames that are taken, ascending; one may stand twice.
        height, width: in pixels, to which each is resized.
        grid: of its groups of frames, rows and columns of patches.
        times: what the prompt says before each group.
        tokens: of a group.
    """

    indices: tuple[int, ...]
    height: int
    width: int
    grid: tuple[int, int, int]
    times: tuple[str, ...]
    tokens: int


def video_source(value: object, root: Path | ImageRoot, fps: object = None) -> VideoSource:
    """The video that a record names: by a path, by {"bytes", "path"} as Parquet files do, or by a list of images.

    Args:
        root: the data root, symlinks resolved, or what takes its place for images.
        fps: frames a second of a list.

    Raises:
        RecordError: a file that is not below the root or not there, a value of another type.
    """
    if isinstance(value, list | tuple):
        if not value:
            raise RecordError("a video has no frames (remove it)")
        if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1000):
            raise RecordError(f"the 'fps' of a video is {shown(fps)}, not a number of frames a second (correct it)")
        frames = tuple(image_source(frame, root) for frame in value)
        return VideoSource(f"{frames[0].name} ...", frames=frames, fps=None if fps is None else float(fps))
    if fps is not None:
        raise RecordError("'fps' is that of a list of frames; a file tells its own (data.video.fps samples it)")
    if isinstance(value, dict):
        unread = sorted(key for key in value if key not in ("bytes", "path") and value[key] is not None)
        if unread:
            raise RecordError(f"a video has {shown(unread[0])}, which is not read (write its path alone)")
        if isinstance(value.get("bytes"), bytes):
            return VideoSource(str(value.get("path") or "embedded video"), data=value["bytes"])
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise RecordError(f'a video is {shown(value)}, not a path (write "video": "folder/name.mp4")')
    if not isinstance(root, Path):
        raise RecordError(f"video {shown(value)} of an archive or a hub dataset is not read (unpack it into a folder)")
    return VideoSource(value, path=file_below(value, root, "video"))


def look(video: VideoSource, settings: VideoConfig, max_pixels: int) -> Film:
    """Its frames, their rate and size. Of a file one frame is decoded, of images the headers are read.

    Raises:
        RecordError: a file that cannot be decoded; frames of more than `max_pixels` pixels or of several sizes; more
            seconds, frames or bytes than `settings` allow.
        UserError: PyAV is missing.
    """
    if video.frames:
        film = _look_at_images(video)
        if film.height * film.width > max_pixels:
            size = f"has frames of {film.width}x{film.height}"
            raise RecordError(f"video {shown(video.name)} {size}, beyond data.max_pixels {max_pixels} (shrink them)")
        return film
    size = len(video.data) if video.data is not None else _stat(video)[0]
    if size > settings.max_gb * GIB:
        reason = f"has {size} bytes, beyond data.video.max_gb {settings.max_gb:g}"
        raise RecordError(f"video {shown(video.name)} {reason} (cut it, or raise the limit)")
    if video.data is not None:
        told = _process(settings).look({"max_pixels": max_pixels}, video.data, video.name)
        film = Film(told["frames"], told["fps"], told["height"], told["width"])
    else:
        limits = settings.timeout_s, settings.memory_gb, max_pixels
        film = _look_at_file(str(video.path), video.name, _stat(video), *limits)
    if (seconds := film.frames / film.fps) > settings.max_seconds:
        reason = f"lasts {seconds:.0f} s, beyond data.video.max_seconds {settings.max_seconds:g}"
        raise RecordError(f"video {shown(video.name)} {reason} (cut it, or raise the limit)")
    return film


@lru_cache(maxsize=KEPT)
def _look_at_file(
    path: str, name: str, stat: tuple[int, int], timeout_s: float, memory_gb: float, max_pixels: int
) -> Film:
    process = video_process(timeout_s, int(memory_gb * GIB))
    told = process.look({"path": path, "max_pixels": max_pixels}, None, name)
    return Film(told["frames"], told["fps"], told["height"], told["width"])


def _stat(video: VideoSource) -> tuple[int, int]:
    """(bytes, time of the last change), by which a file is known again."""
    try:
        found = video.path.stat()
    except OSError as error:
        raise RecordError(f"video {shown(video.name)}: {error.strerror} (correct the path)") from error
    return found.st_size, found.st_mtime_ns


def _process(settings: VideoConfig) -> VideoProcess:
    return video_process(settings.timeout_s, int(settings.memory_gb * GIB))


def _look_at_images(video: VideoSource) -> Film:
    sizes = [shown_size(frame) for frame in video.frames]
    for frame, (width, height) in zip(video.frames, sizes, strict=True):
        if (width, height) != sizes[0]:
            first = f"{sizes[0][0]}x{sizes[0][1]}"
            raise RecordError(f"frame {shown(frame.name)} of a video is {width}x{height}, its first {first} (crop it)")
    width, height = sizes[0]
    return Film(len(video.frames), video.fps, height, width, chosen=True)


def frames_of(
    video: VideoSource, film: Film, indices: list[int], settings: VideoConfig, max_pixels: int
) -> Iterator[np.ndarray]:
    """Frames of ascending indices, (height, width, 3) uint8.

    Raises:
        RecordError: the video is cut off or damaged, takes too long, or is not of the size that `film` says.
    """
    if video.frames:
        found = (np.asarray(load_image(video.frames[index], max_pixels)) for index in indices)
    else:
        question = {"max_pixels": max_pixels} | ({"path": str(video.path)} if video.path is not None else {})
        found = _process(settings).frames(question, video.data, video.name, indices)
    for frame in found:
        if frame.shape[:2] != (film.height, film.width):
            size = f"{frame.shape[1]}x{frame.shape[0]}"
            reason = f"has a frame of {size} behind one of {film.width}x{film.height} (write it in one size)"
            raise RecordError(f"video {shown(video.name)} {reason}")
        yield frame
