"""Keys of a record and of its content parts: which are refused by name, and which count as absent.

Every key of a part is read or refused. Of a record those are refused that would change what is learned; others (`id`,
`source`) are for people.
"""

import re

from ds_moe.config.tasks import LEARNS_PAIRS
from ds_moe.data.images import RecordError
from ds_moe.errors import shown

ONLY = "only images, videos and text are; remove the record"
PAIRS = f"task {LEARNS_PAIRS} learns pairs of answers; remove it to learn the answer of the turns"
# Key -> why a record with it is refused.
UNSUPPORTED = (
    dict.fromkeys(("audios", "audio"), ONLY)
    | dict.fromkeys(("rejected_response", "rejected_messages", "rejected_images", "rejected", "chosen"), PAIRS)
    | dict.fromkeys(("positive_messages", "negative_messages"), PAIRS)
    | dict.fromkeys(("chat_template_kwargs", "mm_processor_kwargs"), "nothing is set for one record alone; remove it")
)
OF_PARTS = {
    "text": ("type", "text"),
    "image": ("type", "image"),
    "image_url": ("type", "image_url"),
    "video": ("type", "video", "frames", "fps", "sample_fps"),
    "video_url": ("type", "video_url"),
}
OF_VIDEOS = re.compile(r"video|clip|film|movie|file_?name", re.IGNORECASE)
VIDEO_FILE = re.compile(r"\.(mp4|m4v|mov|mkv|webm|avi|gif)$", re.IGNORECASE)
OF_IMAGES = re.compile(r"image|img|picture|photo|screenshot|file_?name", re.IGNORECASE)  # in names of keys
IMAGE_FILE = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?)$", re.IGNORECASE)
SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")  # of qwen-vl-utils, and those of videos
SAMPLES = ("nframes", "min_frames", "max_frames", "total_pixels", "raw_fps", *SIZES)


def present(record: dict[str, object]) -> dict[str, object]:
    """The record without absent fields: nulls, which Arrow writes, lists of no tools, objects of nothing.

    Raises:
        RecordError: a key that would change what is learned, and is not read.
    """
    given = {key: value for key, value in record.items() if value is not None}
    if given.get("tools") in ([], {}, "", "[]", "null"):
        del given["tools"]
    if not _any(given.get("objects")):
        given.pop("objects", None)
    for key, fix in UNSUPPORTED.items():
        if _any(given.get(key)):
            raise RecordError(f"{key!r} is not supported ({fix})")
    for several, single in (("images", "image"), ("videos", "video")):
        if given.get(several) and given.get(single):
            raise RecordError(f"the record has both {several!r} and {single!r} (keep one of them)")
        if given.get(several) == [] and single in given:
            del given[several]
    return given


def _any(value: object) -> bool:
    """Whether a value says anything, or is what Arrow makes of an absent structure."""
    if isinstance(value, dict):
        return any(_any(part) for part in value.values())
    return value is not None and value not in ("", [], False)


def check_unread_files(record: dict[str, object], images: bool, videos: bool) -> None:
    """Refuse a key that names an image file, in a record of which no image is read (`images`), or a video file, in one
    of which no video is (`videos`): the record would be learned without it."""
    for key, value in record.items():
        while isinstance(value, list | dict) and value:
            value = value[0] if isinstance(value, list) else value.get("path") or value.get("url")
        if not images and isinstance(value, str) and OF_IMAGES.search(key) and IMAGE_FILE.search(value):
            fix = "call it 'images', with one <image> in a text for each; or remove it"
            raise RecordError(f"{key!r} names an image ({shown(value)}), and is not read ({fix})")
        if not videos and isinstance(value, str) and OF_VIDEOS.search(key) and VIDEO_FILE.search(value):
            fix = "call it 'videos', with one <video> in a text for each; or remove it"
            raise RecordError(f"{key!r} names a video ({shown(value)}), and is not read ({fix})")


def part_fields(part: dict[str, object], number: int) -> dict[str, object]:
    """A content part of message `number` without nulls; OpenAI's {"image_url": {"url": path}} becomes {"image": path},
    and of a video "frames" become "video", "sample_fps" "fps".

    Raises:
        RecordError: a key that its type does not have.
    """
    given = {key: value for key, value in part.items() if value is not None}
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in OF_PARTS:
        raise RecordError(f"message {number}: content part of type {shown(kind)} (use 'text', 'image' or 'video')")
    unread = sorted(set(given) - set(OF_PARTS[kind]))
    if unread:
        fix = "remove it; the model's preprocessor_config.json sets the size" if unread[0] in SIZES else "remove it"
        fix = "remove it; section data.video sets it" if kind == "video" and unread[0] in SAMPLES else fix
        raise RecordError(f"message {number}: the {kind} part has {shown(unread[0])}, which is not read ({fix})")
    if kind in ("image_url", "video_url"):
        name = kind.removesuffix("_url")
        return {"type": name, name: _url(given.get(kind), number, kind)}
    for other, name in (("frames", "video"), ("sample_fps", "fps")) if kind == "video" else ():
        if other in given and name in given:
            raise RecordError(f"message {number}: the video part has both {other!r} and {name!r} (keep one of them)")
        if other in given:
            given[name] = given.pop(other)
    return given


def _url(value: object, number: int, kind: str) -> object:
    if not isinstance(value, dict):
        return value
    unread = sorted(key for key in value if key != "url" and value[key] not in (None, "auto"))
    if unread:
        raise RecordError(f"message {number}: the {kind} has {shown(unread[0])}, which is not read (remove it)")
    return value.get("url")
