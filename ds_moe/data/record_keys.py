"""Keys of a record and of its content parts: which are refused by name, and which count as absent.

Every key of a part is read or refused. Of a record those are refused that would change what is learned; others (`id`,
`source`) are for people.
"""

import re

from ds_moe.config.tasks import LEARNS_PAIRS
from ds_moe.data.images import RecordError
from ds_moe.errors import shown

ONLY = "only images and text are; remove the record"
PAIRS = f"task {LEARNS_PAIRS} learns pairs of answers; remove it to learn the answer of the turns"
# Key -> why a record with it is refused.
UNSUPPORTED = (
    dict.fromkeys(("videos", "video", "audios", "audio"), ONLY)
    | dict.fromkeys(("rejected_response", "rejected_messages", "rejected_images", "rejected", "chosen"), PAIRS)
    | dict.fromkeys(("positive_messages", "negative_messages"), PAIRS)
    | dict.fromkeys(("chat_template_kwargs", "mm_processor_kwargs"), "nothing is set for one record alone; remove it")
)
OF_PARTS = {"text": ("type", "text"), "image": ("type", "image"), "image_url": ("type", "image_url")}
OF_IMAGES = re.compile(r"image|img|picture|photo|screenshot|file_?name", re.IGNORECASE)  # in names of keys
IMAGE_FILE = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?)$", re.IGNORECASE)
SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")  # of qwen-vl-utils


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
    if given.get("images") and given.get("image"):
        raise RecordError("the record has both 'images' and 'image' (keep one of them)")
    if given.get("images") == [] and "image" in given:
        del given["images"]
    return given


def _any(value: object) -> bool:
    """Whether a value says anything, or is what Arrow makes of an absent structure."""
    if isinstance(value, dict):
        return any(_any(part) for part in value.values())
    return value is not None and value not in ("", [], False)


def check_unread_image(record: dict[str, object]) -> None:
    """Refuse a key that names an image file, in a record of which no image is read: it would be learned without it."""
    for key, value in record.items():
        while isinstance(value, list | dict) and value:
            value = value[0] if isinstance(value, list) else value.get("path") or value.get("url")
        if isinstance(value, str) and OF_IMAGES.search(key) and IMAGE_FILE.search(value):
            fix = "call it 'images', with one <image> in a text for each; or remove it"
            raise RecordError(f"{key!r} names an image ({shown(value)}), and is not read ({fix})")


def part_fields(part: dict[str, object], number: int) -> dict[str, object]:
    """A content part of message `number` without nulls; OpenAI's {"image_url": {"url": path}} becomes {"image": path}.

    Raises:
        RecordError: a key that its type does not have.
    """
    given = {key: value for key, value in part.items() if value is not None}
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in OF_PARTS:
        raise RecordError(f"message {number}: content part of type {shown(kind)} (use 'text' or 'image')")
    unread = sorted(set(given) - set(OF_PARTS[kind]))
    if unread:
        fix = "remove it; the model's preprocessor_config.json sets the size" if unread[0] in SIZES else "remove it"
        raise RecordError(f"message {number}: the {kind} part has {shown(unread[0])}, which is not read ({fix})")
    if kind == "image_url":
        return {"type": "image", "image": _url(given.get("image_url"), number)}
    return given


def _url(value: object, number: int) -> object:
    if not isinstance(value, dict):
        return value
    unread = sorted(key for key in value if key != "url" and value[key] not in (None, "auto"))
    if unread:
        raise RecordError(f"message {number}: the image_url has {shown(unread[0])}, which is not read (remove it)")
    return value.get("url")
