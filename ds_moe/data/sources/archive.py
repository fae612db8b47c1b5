"""The members of a tar file, of which none is ever written to disk.

Python's `tarfile` ends at the first header that it cannot read as if the archive ended there, passes over what stands
behind an end mark, and reads headers of any size into memory. Here every byte is accounted for: an archive that is cut
off, damaged, or two in one is an error.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
MAX_NAME = 2**16  # bytes of a header that holds a long name
FILES, FOLDER = (b"0", b"\0", b"7"), b"5"  # types of members; \0 is that of old archives
LONG_NAME, LONG_LINK, PAX, GLOBAL_PAX = b"L", b"K", b"x", b"g"
REFUSED = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


class ArchiveError(Exception):
    """Says what is wrong with an archive, with the fix in parentheses."""


@dataclass(frozen=True)
class Member:
    """A file in an archive: its bytes lie at [start, start + size) of the archive, its headers begin at `header`."""

    name: str
    header: int
    start: int
    size: int


def members(archive: BinaryIO, header: int = 0) -> Iterator[Member]:
    """The files of an archive in their order, from the one whose headers begin at `header`.

    Raises:
        ArchiveError: it is cut off, damaged, holds links or devices, or has something behind its end mark.
    """
    end = archive.seek(0, os.SEEK_END)
    place, first = header, header
    name: str | None = None  # that headers before the member's own give it
    size: int | None = None
    while True:
        block = _read(archive, place, BLOCK, end)
        if block == bytes(BLOCK):
            _check_end(archive, place, end)
            return
        if not _sums_up(block):
            raise ArchiveError(f"is no tar file, or damaged, at byte {place} (make it again)")
        kind, own = block[156:157], _number(block[124:136], place)
        start = place + BLOCK
        if kind in (LONG_NAME, PAX, LONG_LINK, GLOBAL_PAX):
            if own > MAX_NAME:
                raise ArchiveError(f"has a header of {own} bytes at byte {place} (make it again)")
            held = _read(archive, start, own, end)
            if kind == LONG_NAME:
                name = _text(held)
            elif kind in (PAX, GLOBAL_PAX):
                keys = _pax(held, place)
                if (
                    kind == GLOBAL_PAX
                    and keys.keys() & {"path", "size"}
                    or any(key.startswith("GNU.sparse") for key in keys)
                ):
                    raise ArchiveError(f"has a header at byte {place} that is not read (make it by plain tar)")
                name = keys.get("path", name)
                size = _decimal(keys["size"], place) if "size" in keys else size
            place = start + _padded(own)
            continue
        size = own if size is None else size
        name = _own_name(block) if name is None else name
        if kind in FILES:
            if start + size > end:
                raise ArchiveError(f"is cut off within {name!r}, at byte {end} (copy it again)")
            yield Member(name, first, start, size)
        elif kind != FOLDER:
            what = REFUSED.get(kind, f"a member of the type {kind!r}")
            raise ArchiveError(f"holds {what}, {name!r} (only files are read: make it without)")
        place = first = start + (_padded(size) if kind in FILES else 0)
        name = size = None


def _read(archive: BinaryIO, place: int, size: int, end: int) -> bytes:
    archive.seek(place)
    found = archive.read(size)
    if len(found) < size:
        raise ArchiveError(f"is cut off: it ends at byte {end} without an end mark (copy it again)")
    return found


def _check_end(archive: BinaryIO, place: int, end: int) -> None:
    """Behind the end mark stand zeros alone, at most those that fill up a record of tar."""
    archive.seek(place)
    while chunk := archive.read(2**20):
        if chunk.count(0) != len(chunk):
            raise ArchiveError(f"goes on behind its end mark at byte {place}: two archives in one? (split them)")


def _sums_up(block: bytes) -> bool:
    """Whether the checksum of a header is right; signed sums are those of very old programs."""
    try:
        written = int(block[148:156].strip(b"\0 ") or b"0", 8)
    except ValueError:
        return False
    rest = block[:148] + b" " * 8 + block[156:]
    return written in (sum(rest), sum(byte - 256 if byte > 127 else byte for byte in rest))


def _number(field: bytes, place: int) -> int:
    """A number of a header: octal, or behind a byte of 0x80 binary."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        value = int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        value = -1
    if value < 0:
        raise ArchiveError(f"is damaged: no size at byte {place} (make it again)")
    return value


def _decimal(text: str, place: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ArchiveError(f"is damaged: no size at byte {place} (make it again)")
    return int(text)


def _pax(held: bytes, place: int) -> dict[str, str]:
    """The keys of an extended header: records of "<length> <key>=<value>\\n"."""
    keys = {}
    while held:
        digits, space, _ = held.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = held[len(digits) + 1 : length - 1].partition(b"=")
        if not (space and equals and len(digits) + 2 < length <= len(held) and held[length - 1 : length] == b"\n"):
            raise ArchiveError(f"is damaged: a broken header at byte {place} (make it again)")
        keys[_text(key)] = _text(value)
        held = held[length:]
    return keys


def _own_name(block: bytes) -> str:
    name = _text(block[:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", errors="replace")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
