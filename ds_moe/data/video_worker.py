"""The program in which video files are opened, apart from the trainer. Standard library, PyAV and NumPy only.

The libraries below PyAV are large and read what strangers have written. They run in a process of their own, with a
limit on its memory, so that a file that crashes them costs one record. The trainer (`video_process.py`) waits no longer
than its limit, ends a process that does not answer, and starts another one.

    trainer -> worker   {"memory": bytes, "timeout_s": seconds}                                       once
                        {"ask": "look" | "frames", "path": ... | "bytes": number, "max_pixels": ...,
                         "indices": [...]}, with that number of bytes behind the line                 for each question
    worker -> trainer   {"ready": version} or {"error": ..., "missing": true}                         once
                        {"frames", "fps", "height", "width"}                                          to "look"
                        {"height", "width"} and the pixels behind it, for each index in order         to "frames"
                        {"error": ...}                                                                to both
"""

import io
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np

Question = dict[str, Any]
HEAD = 64  # bytes by which a format is told
READ = "use mp4, mov, mkv, webm, gif or avi"
# Decoders of what cameras, phones, editors and the web write. Others that the libraries have are never run.
CODECS = (
    *("h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "mpeg4", "mpeg1video", "mpeg2video"),
    *("mjpeg", "gif", "png", "ffv1", "rawvideo", "msmpeg4v2", "msmpeg4", "wmv2", "h263", "prores"),
)
MOST_FPS = 1000.0  # beyond it a frame rate is no camera's
MOST_FRAMES = 2**22  # that are counted
FAILED = "cannot be decoded"
NO_MEMORY = f"{FAILED} in data.video.memory_gb (raise it, or shrink the video)"


class CannotUse(Exception):
    """Why a video is not used; the message ends with the fix."""


# --- what a file holds


def look(question: Question, data: bytes | None) -> Question:
    """How many frames a video has, how many a second, and how large they are. Its first frame is decoded."""
    with _opened(question, data) as (container, stream):
        first = next((frame for _, frame in _decoded(container, stream)), None)
        if first is None:
            raise CannotUse("has no frame that can be decoded (remove it)")
        height, width = _turned_size(first)
        rate = stream.average_rate
        frames, seconds = 0, 0.0
        if stream.frames and container.format.name.startswith("mov"):  # other headers may lie, or say nothing
            entries = getattr(stream, "index_entries", ())  # which PyAV 15 does not have
            frames = sum(not entry.is_discard for entry in entries)  # an edit list may leave frames out
        if not frames:
            frames, seconds = _counted(question, data)
        if not frames:
            raise CannotUse("has no frame that is shown (remove it)")
        fps = float(rate) if rate else frames / seconds if seconds > 0 else float(frames == 1)
    if not (math.isfinite(fps) and 0 < fps <= MOST_FPS):
        raise CannotUse(f"tells {fps:g} frames a second (write it again with its frame rate)")
    return {"frames": frames, "fps": fps, "height": height, "width": width}


def _counted(question: Question, data: bytes | None) -> tuple[int, float]:
    """The packets of a video that show a frame, and the seconds from the first to the end of the last."""
    count, first, last = 0, math.inf, -math.inf
    with _opened(question, data) as (container, stream):
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard or _hidden(packet, stream):
                continue
            count += 1
            if count > MOST_FRAMES:
                raise CannotUse(f"has more than {MOST_FRAMES} frames (cut it)")
            if packet.pts is not None and packet.time_base:
                begins = float(packet.pts * packet.time_base)
                first = min(first, begins)
                last = max(last, begins + float((packet.duration or 0) * packet.time_base))
    return count, last - first if count else 0.0


def _hidden(packet: Any, stream: Any) -> bool:
    """Whether a packet of VP8 holds a picture to predict from that is not shown: bit 4 of its tag is `show_frame`."""
    return stream.codec_context.name in ("vp8", "libvpx") and not memoryview(packet)[0] & 16


def frames(question: Question, data: bytes | None) -> Iterator["np.ndarray"]:
    """The frames of these indices, (height, width, 3) uint8. Frames count as they are shown, from 0."""
    wanted, last = set(question["indices"]), max(question["indices"])
    with _opened(question, data) as (container, stream):
        number = -1
        for number, frame in _decoded(container, stream):
            if number in wanted:
                yield _pixels(frame)
            if number == last:
                return
    raise CannotUse(f"ends after {number + 1} frames, its index tells more (it is cut off: write it again)")


# --- files


@contextmanager
def _opened(question: Question, data: bytes | None) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, ready to be decoded."""
    import av

    with open(question["path"], "rb") if data is None else io.BytesIO(data) as file:
        kind = format_of(file)
        file.seek(0)
        # The format is chosen here and no other file is opened, whatever this one asks for.
        options = {"format_whitelist": kind, "protocol_whitelist": "", "codec_whitelist": ",".join(CODECS)}
        container = av.open(file, format=kind, container_options=options, io_open=_refuse)
        try:
            yield container, _video_stream(container, question["max_pixels"])
        finally:
            container.close()


def format_of(file: BinaryIO) -> str:
    """What libav calls the format of a file, by its first bytes."""
    head = file.read(HEAD)
    if not head:
        raise CannotUse("is empty (replace the file)")
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"):
        return "mov"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    raise CannotUse(f"is not a video that can be read ({READ})")


def _refuse(url: str, flags: int, options: dict[str, str]) -> None:
    raise CannotUse("names another file (write it as one file)")


def _video_stream(container: Any, max_pixels: int) -> Any:
    pictures = [one for one in container.streams.video if not _is_cover(one)]
    if not pictures:
        raise CannotUse("has no video stream: it is sound alone, or damaged (remove it)")
    stream = pictures[0]
    context = stream.codec_context
    if context is None or context.name not in CODECS:
        name = "unknown" if context is None else context.name
        raise CannotUse(f"is encoded as {name}, which is not read (write it as H.264)")
    check_size(context.height, context.width, max_pixels)
    context.thread_count = 1  # a loading process has one core
    context.options = {"max_pixels": str(max_pixels)}
    return stream


def _is_cover(stream: Any) -> bool:
    """Whether a stream is the picture on the cover of a record."""
    import av.stream

    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise CannotUse(f"is {width}x{height}, beyond data.max_pixels {max_pixels} (shrink it, or raise the limit)")


# --- frames


def _decoded(container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
    """(number, frame) in the order in which they are shown."""
    number = 0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise CannotUse(f"is damaged behind frame {number} (it is cut off: write it again)")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise CannotUse(f"has a damaged frame {number} (write it again)")
            yield number, frame
            number += 1


def _quarter_turns(frame: Any) -> int:
    """Counterclockwise, as the file says that it is to be shown."""
    if frame.rotation % 90:
        raise CannotUse(f"is to be turned by {frame.rotation} degrees (turn its pixels)")
    return frame.rotation // 90 % 4


def _turned_size(frame: Any) -> tuple[int, int]:
    sides = (frame.height, frame.width)
    return sides[::-1] if _quarter_turns(frame) % 2 else sides


def _pixels(frame: Any) -> "np.ndarray":
    """(height, width, 3) uint8, turned; what is transparent is over white, as in images."""
    import numpy as np

    clear = any(component.is_alpha for component in frame.format.components) or frame.format.has_palette
    pixels = _reformatted(frame, "rgba" if clear else "rgb24")
    if clear:
        from PIL import Image

        image = Image.fromarray(pixels)
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        pixels = np.asarray(white)
    return np.ascontiguousarray(np.rot90(pixels, _quarter_turns(frame)))


def _reformatted(frame: Any, form: str) -> "np.ndarray":
    return frame.reformat(format=form, threads=1).to_ndarray()


# --- the process


def answer(question: Question, data: bytes | None) -> Iterator[tuple[Question, bytes]]:
    """Lines, and what stands behind each."""
    try:
        if question["ask"] == "look":
            yield look(question, data), b""
            return
        for pixels in frames(question, data):
            check_size(pixels.shape[0], pixels.shape[1], question["max_pixels"])
            yield {"height": pixels.shape[0], "width": pixels.shape[1]}, pixels.tobytes()
    except CannotUse as error:
        yield {"error": str(error)}, b""
    except MemoryError:
        yield {"error": NO_MEMORY}, b""
    except Exception as error:  # libraries may raise anything for hostile bytes
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        yield {"error": f"{FAILED}: {reason} (write it again)"}, b""


def serve(questions: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the trainer closes its end."""
    settings = json.loads(questions.readline() or b"{}")
    if not settings:
        return
    try:
        import av
        import av.logging
        import numpy as np  # noqa: F401 (before there is a limit)
        from PIL import Image  # noqa: F401
    except ImportError as error:
        _write(answers, {"error": str(error), "missing": True}, b"")
        return
    av.logging.set_level(av.logging.PANIC)
    _limit(settings["memory"])
    _write(answers, {"ready": av.__version__}, b"")
    for line in iter(questions.readline, b""):
        question = json.loads(line)
        data = None
        if "bytes" in question and (data := _behind(questions, question["bytes"])) is None:
            _write(answers, {"error": NO_MEMORY}, b"")
            continue
        # Of processor time, in case the trainer dies while a decoder is caught in a loop.
        signal.setitimer(signal.ITIMER_PROF, 2 * settings["timeout_s"])
        for head, behind in answer(question, data):
            _write(answers, head, behind)


def _behind(questions: BinaryIO, size: int) -> bytes | None:
    """The bytes behind a question; None where there is no memory for them, and they are passed over."""
    try:
        return questions.read(size)
    except MemoryError:  # before one of them was taken
        while size > 0 and (part := questions.read(min(size, 1 << 16))):
            size -= len(part)
        return None


def _limit(memory: int) -> None:
    for kind, most in ((resource.RLIMIT_DATA, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _write(answers: BinaryIO, head: Question, behind: bytes) -> None:
    answers.write(json.dumps(head, default=_plain).encode() + b"\n" + behind)
    answers.flush()


def _plain(value: object) -> object:
    return float(value) if isinstance(value, Fraction) else str(value)


def _apart() -> BinaryIO:
    """Where answers go. What libraries print goes elsewhere."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    try:
        serve(sys.stdin.buffer, _apart())
    except BrokenPipeError:  # the trainer is gone
        sys.stdout = None
