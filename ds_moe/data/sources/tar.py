"""WebDataset shards: tar files in which neighbouring members of one name, but for the ending, make up a record.

The record is the object in the member `.json`. Its images are members of the same name: those that it names, or, where
it names none, all of them in their order.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ds_moe.data.images import ImageRoot, ImageSource, RecordError
from ds_moe.data.record_kind import Parsed
from ds_moe.data.sources.archive import ArchiveError, Member, members
from ds_moe.data.sources.as_opened import FileAsOpened
from ds_moe.data.sources.indexed import IndexedRecords
from ds_moe.data.sources.jsonl import MAX_LINE, json_value
from ds_moe.errors import UserError, shown

MAX_IMAGE = 2**27  # bytes of a member
KEY = re.compile(r"^((?:.*/)?[^./]+)\.([^/]*)$")  # WebDataset's: all up to the first dot of the last part of a path
IMAGES = frozenset(("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm"))
TEXTS = frozenset(("txt", "text", "cls", "caption"))
OF_APPLE = "._"  # begins the names of files that macOS adds to archives


@dataclass(frozen=True)
class Members:
    """The members of one record, by their endings."""

    key: str
    header: int
    parts: tuple[tuple[str, Member], ...]

    def having(self, endings: frozenset[str]) -> list[Member]:
        """The members whose last ending is one of these."""
        return [member for ending, member in self.parts if ending.rpartition(".")[2].lower() in endings]


class TarRecords(IndexedRecords[Members, Parsed]):
    """One record a group of members; its key is the byte offset of the first one's headers."""

    def _walk(self) -> Iterator[tuple[int, int, Members]]:
        met: set[str] = set()
        self._archive = FileAsOpened.of(self._file.path, self._file.name)
        self._last: Members | None = None
        try:
            for number, group in enumerate(self._groups(0), start=1):
                if group.key in met:
                    text = f"data: {self._file.name}: the members of {shown(group.key)} do not stand together"
                    raise UserError(f"{text}, so they are no record (make the archive from sorted names)")
                met.add(group.key)
                self._last = group
                yield group.header, number, group
        except ArchiveError as error:
            raise UserError(f"data: {self._file.name} {error}") from error
        with self._archive.open() as archive:
            self.sha256 = hashlib.file_digest(archive, "sha256").hexdigest()

    def _groups(self, header: int) -> Iterator[Members]:
        """The groups from the one whose headers begin there. Raises `ArchiveError`."""
        with self._archive.open() as archive:
            key, parts = "", list[tuple[str, Member]]()
            for member in members(archive, header):
                if PurePosixPath(member.name).name.startswith(OF_APPLE):
                    continue
                match = KEY.match(member.name)
                of, ending = (match[1], match[2]) if match else (member.name, "")
                if parts and of != key:
                    yield Members(key, parts[0][1].header, tuple(parts))
                    parts = []
                key = of
                parts.append((ending, member))
            if parts:
                yield Members(key, parts[0][1].header, tuple(parts))

    def _read(self, key: int) -> Members:
        if self._last is not None and self._last.header == key:
            return self._last
        try:
            return next(self._groups(key))
        except (ArchiveError, StopIteration) as error:
            raise RecordError(f"the archive has changed since it was indexed: {error} (start again)") from error

    def _where(self, key: int, number: int) -> str:
        """archive:member, whose number would not help to find it."""
        try:
            group = self._read(key)
        except RecordError:
            return f"{self._file.name}:{number}"
        own = [member for ending, member in group.parts if ending == "json"]
        return f"{self._file.name}:{(own or [group.parts[0][1]])[0].name}"

    def _decode(self, raw: Members) -> object:
        endings = [ending for ending, _ in raw.parts]
        if twice := next((ending for ending in endings if endings.count(ending) > 1), None):
            raise RecordError(f"two members {shown(f'{raw.key}.{twice}')} (keep one of them)")
        own = [member for ending, member in raw.parts if ending == "json"]
        if not own:
            raise RecordError(f"no member {shown(f'{raw.key}.json')} with the messages (add it)")
        unread = [name for name in endings if name != "json" and name.rpartition(".")[2].lower() not in IMAGES | TEXTS]
        if unread:
            raise RecordError(f"the member {shown(f'{raw.key}.{unread[0]}')} is not read (leave it out)")
        record = json_value(self._bytes(own[0], MAX_LINE), "write one object")
        if not isinstance(record, dict):
            return record
        images, mapped = raw.having(IMAGES), self._reading.columns
        columns: dict[str, object] = {
            ending: member.name if member in images else self._bytes(member, MAX_LINE).decode("utf-8", errors="replace")
            for ending, member in raw.parts
            if ending != "json" and ending in mapped.values()
        }
        if images and mapped.get("images") not in columns and not _names_images(record, mapped.get("images")):
            columns["images"] = [member.name for member in images]
        return record | columns

    def _root_of(self, raw: Members) -> Path | ImageRoot:
        return MembersOf(self, raw)

    def image(self, member: Member) -> ImageSource:
        return ImageSource(member.name, data=self._bytes(member, MAX_IMAGE))

    def _bytes(self, member: Member, most: int) -> bytes:
        if member.size > most:
            raise RecordError(
                f"the member {shown(member.name)} has {member.size} bytes, at most {most} are read (shrink it)"
            )
        with self._archive.open() as archive:
            archive.seek(member.start)
            return archive.read(member.size)


@dataclass(frozen=True)
class MembersOf:
    """The images of one record of an archive, in the place of a folder."""

    records: TarRecords
    group: Members

    def image(self, name: str) -> ImageSource:
        """The member of that name, or of that last part of one. Raises `RecordError` if there is none."""
        images = self.group.having(IMAGES)
        found = [member for member in images if member.name == name]
        found += [member for member in images if PurePosixPath(member.name).name == PurePosixPath(name).name]
        if not found:
            held = ", ".join(shown(member.name) for member in images) or "none"
            raise RecordError(
                f"missing image {shown(name)} (no such member beside the record, whose images are {held})"
            )
        return self.records.image(found[0])


def _names_images(record: dict[str, object], column: str | None) -> bool:
    """Whether a record says which images it has: in a column, in content parts, or by <img> in a text."""
    if any(record.get(key) is not None for key in ("images", "image", column) if key is not None):
        return True
    ahead = list(record.values())
    while ahead:
        one = ahead.pop()
        if isinstance(one, str) and "<img>" in one:
            return True
        if isinstance(one, dict):
            if one.get("type") in ("image", "image_url") and (one.get("image") or one.get("image_url")):
                return True
            ahead += one.values()
        elif isinstance(one, list):
            ahead += one
    return False
