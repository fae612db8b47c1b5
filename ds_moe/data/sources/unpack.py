"""Compressed files, unpacked once: a record is read from any place of a file, which gzip and zstd do not offer."""

import errno
import fcntl
import gzip
import hashlib
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, cast

from ds_moe.data.sources.as_opened import readable
from ds_moe.errors import UserError, one_line

CHUNK = 2**20
MOST_TIMES = 200  # its own size that a file may unpack to; texts of people unpack to 3 to 20 times
ALWAYS = 2**26  # bytes that any file may unpack to


def unpacked(file: Path, name: str, cache_dir: Path) -> Path:
    """The unpacked copy of a .gz or .zst file in `cache_dir`, which the first process of a host writes.

    Raises:
        UserError: the file is damaged or cut off, unpacks to more than MOST_TIMES its size, or the disk is full.
    """
    with readable(name), file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    target = cache_dir / f"unpacked_{digest[:32]}.jsonl"
    with alone(target):
        if not target.exists():
            size = _write(file, name, target)
            print(f"data: {name} is unpacked into {target} ({size:,} bytes), where records are read", flush=True)
    return target


def _write(file: Path, name: str, target: Path) -> int:
    limit = max(ALWAYS, MOST_TIMES * file.stat().st_size)
    size, partial = 0, None
    try:
        # The name is unlike that of any other host's, which may write into the same folder.
        with opened(file) as packed, NamedTemporaryFile(dir=target.parent, suffix=".partial", delete=False) as out:
            partial = Path(out.name)
            while chunk := packed.read(CHUNK):
                size += len(chunk)
                if size > limit:
                    fix = "if it is meant, unpack it by hand and name the file"
                    raise UserError(
                        f"data: {name} unpacks to more than {limit:,} bytes, {MOST_TIMES} times its size ({fix})"
                    )
                out.write(chunk)
                if size % (64 * CHUNK) == 0 and shutil.disk_usage(target.parent).free < 64 * CHUNK:
                    raise UserError(f"data: {name} does not fit unpacked into {target.parent} (make room there)")
        if not target.exists():  # else another host was faster, and may have opened it
            partial.replace(target)
    except (EOFError, OSError, zlib.error) as error:  # pyarrow raises OSError for damage, gzip EOFError where it ends
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UserError(f"data: {name} does not fit unpacked into {target.parent} (make room there)") from error
        raise UserError(f"data: {name} cannot be unpacked: {one_line(error)} (replace the file)") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    return size


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """The bytes that a compressed file holds, in order. Reading raises OSError, EOFError or zlib.error for damage."""
    if file.suffix == ".gz":
        with gzip.open(file, "rb") as stream:
            yield cast(IO[bytes], stream)
        return
    import pyarrow  # which brings zstd; Python does from 3.14 on

    with pyarrow.input_stream(str(file), compression="zstd") as stream:
        yield stream


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """One process of this host at a time. Where the file system has no locks, each works for itself."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
