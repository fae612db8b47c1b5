"""Every byte of an archive is accounted for: one that is cut off, damaged or two in one is an error, at any place."""

import io
import json
import tarfile

import pytest

from ds_moe.data.sources.archive import ArchiveError, members
from tests.data.sources import tar

LONG = "folder/" * 30 + "name.json"


def found(content: bytes) -> list[tuple[str, bytes]]:
    return [(one.name, content[one.start : one.start + one.size]) for one in members(io.BytesIO(content))]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_members_are_those_that_tarfile_finds(form):
    stream = io.BytesIO()
    names = ["a.json", "x/y.png", "\u00fcml\u00e4ut.txt", *([] if form == tarfile.USTAR_FORMAT else [LONG])]
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for number, name in enumerate(names):
            about = tarfile.TarInfo(name)
            about.size = 300 * number
            archive.addfile(about, io.BytesIO(bytes([number]) * about.size))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    content = stream.getvalue()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        expected = [(one.name, archive.extractfile(one).read()) for one in archive if one.isfile()]
    assert found(content) == expected
    middle = list(members(io.BytesIO(content)))[1]
    assert list(members(io.BytesIO(content), middle.header))[0] == middle


def test_an_archive_that_is_cut_off_anywhere_is_an_error():
    whole = tar({f"{number}.json": json.dumps(number).encode() * 100 for number in range(4)})
    end = whole.rstrip(b"\0")
    last = -(-len(end) // 512) * 512
    for cut in range(0, last + 1, 128):
        with pytest.raises(ArchiveError, match="is cut off|no tar file, or damaged"):
            found(whole[:cut])
    assert len(found(whole[: last + 512])) == 4


def test_a_damaged_header_is_an_error_where_tarfile_ends_in_silence():
    """Negative control of the reason for this reader."""
    whole = bytearray(tar({"a.json": b"1", "b.json": b"2", "c.json": b"3"}))
    whole[1024 + 10] ^= 1
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        assert archive.getnames() == ["a.json"]
    with pytest.raises(ArchiveError, match="is no tar file, or damaged, at byte 1024"):
        found(bytes(whole))


def test_what_stands_behind_the_end_mark_is_an_error():
    two = tar({"a.json": b"1"}) + tar({"b.json": b"2"})
    with pytest.raises(ArchiveError, match="two archives in one"):
        found(two)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S"])
def test_only_files_are_read(kind):
    about = tarfile.TarInfo("a.json")
    about.type, about.linkname = kind, "/etc/hostname"
    content = about.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    with pytest.raises(ArchiveError, match="'a.json'"):
        found(content)
