"""What is noted beside a record that is stored: its index, and what its images' files were like."""

import os

from ds_moe.data.images import ImageSource
from ds_moe.data.prepared.shards import Stored
from ds_moe.data.record_kind import images_of

Stamp = tuple[str, int, int]  # of an image's file: path, size, time of its last change in ns


def note_of(index: int, stamps: list[Stamp]) -> list[object]:
    """What is written beside a record that is stored; beside one that is not, nothing is."""
    return [index, stamps]


def is_of(stored: Stored, index: int) -> bool:
    """Whether this is that record: files of the same name may have been made anew, of other numbers of records."""
    return isinstance(stored.note, list) and stored.note[0] == index


def stamps_in(stored: Stored) -> list[Stamp]:
    return [(file, size, mtime_ns) for file, size, mtime_ns in stored.note[1]]


def stamps_now(parsed: object) -> list[Stamp] | None:
    """Of the files that a record's images are now, links and roots resolved; None: one cannot be looked at."""
    try:
        return stamps_of(images_of(parsed))
    except OSError:
        return None


def stamps_of(images: list[ImageSource]) -> list[Stamp]:
    """Of those that are files: an image in a data file is as the file is."""
    files = [os.fspath(image.path.resolve()) for image in images if image.path is not None]
    return [(file, stat.st_size, stat.st_mtime_ns) for file in files for stat in [os.stat(file)]]
