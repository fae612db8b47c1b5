"""Rollout files are written whole or not at all, and nothing is written through a link or among other files."""

import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from ds_moe.data.images import ImageSource, load_image
from ds_moe.errors import UserError

STORED = re.compile(r"[0-9a-f]{16}\.png(\.partial)?")  # names of images that rollouts write
Record = dict[str, Any]  # as rollout_record.py reads it, but before it is written "images" holds the sources


def check_out(out: Path, data: str) -> None:
    """Raise `UserError` before anything is sampled where the rollouts could not be written to `out`, or must not be."""
    if out.suffix not in (".jsonl", ".ndjson", ".json"):
        raise UserError(f"{out}: rollouts are JSON lines; call the file {out.with_suffix('.jsonl')}")
    if out.is_dir() or (data != "digits" and out.exists() and Path(data).exists() and out.samefile(data)):
        raise UserError(f"{out} is {'a folder' if out.is_dir() else 'the data itself'}; give OUT.jsonl another name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    images_of(out)


def write_rollouts(records: list[Record], file: Path) -> None:
    """JSON lines, complete or not at all; images as PNG, each once, in the folder of `images_of`.

    Raises `UserError` where that folder is not one that rollouts have made: nothing is written into it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    folder, partial = images_of(file), file.with_name(file.name + ".partial")
    partial.unlink(missing_ok=True)  # it may be a link, which `open` would write through
    with partial.open("x", encoding="utf-8") as lines:
        for record in records:
            images = [_stored(image, folder) for image in record["images"]]
            lines.write(json.dumps({**record, "images": images}) + "\n")
    os.replace(partial, file)


def images_of(file: Path) -> Path:
    """The folder of a rollout file's images, beside it: new, or made by earlier rollouts of the same name."""
    folder = file.with_name(f"{file.stem}_images")
    ours = not folder.is_symlink() and (folder.is_dir() or not folder.exists())
    inside = folder.iterdir() if ours and folder.exists() else ()
    if not ours or not all(STORED.fullmatch(one.name) and one.is_file() and not one.is_symlink() for one in inside):
        text = f"{folder} is not a folder that rollouts have made, so no images are written there"
        raise UserError(f"{text}; move it away, or give OUT.jsonl another name")
    return folder


def _stored(image: ImageSource, folder: Path) -> str:
    """Write an image into `folder` unless it is there; its path from the folder above."""
    data = image.data if image.data is not None else Path(str(image.path)).read_bytes()
    file = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.png"
    if not file.exists():
        folder.mkdir(exist_ok=True)
        partial = file.with_name(f"{file.name}.partial")
        load_image(image, max_pixels=sys.maxsize).save(partial, "PNG")
        os.replace(partial, file)
    return f"{folder.name}/{file.name}"
