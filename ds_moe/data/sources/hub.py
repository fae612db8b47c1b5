"""A dataset of the Hugging Face hub: the files of one split at one commit, in the hub's own cache.

`datasets.load_dataset` is not used for it. Without a network it takes whatever version of the dataset it has prepared
last, also where another revision is asked for; and of a JSON file it makes Arrow, see `jsonl.py`.
"""

import os
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ds_moe.config.sections import SourceConfig
from ds_moe.config.sources import HUB
from ds_moe.data.images import ImageSource, RecordError, image_source
from ds_moe.data.sources.files import DataFile, check_shards, data_file, one_form
from ds_moe.errors import UserError, one_line, shown

NAME = re.compile(r"^[\w-][\w.-]*/[\w-][\w.-]*$", re.ASCII)
TRAIN = "train"


@dataclass(frozen=True)
class Snapshot:
    """A commit of a dataset in the cache; in the place of a folder, it is where image paths start from.

    Files of a snapshot are links into the folder `blobs` beside it, so that paths may not be asked to stay below it.
    """

    folder: Path
    base: PurePosixPath  # the folder within it

    def image(self, name: str) -> ImageSource:
        parts = PurePosixPath(name).parts
        if ".." in parts or PurePosixPath(name).is_absolute():
            raise RecordError(f"image {shown(name)} leaves the dataset (write a path within it)")
        cache = self.folder.parents[1].resolve()  # of this dataset: blobs, refs, snapshots
        found = image_source(str(self.folder.resolve().relative_to(cache) / self.base / name), cache)
        return ImageSource(name, found.path)


def hub_files(source: SourceConfig) -> list[DataFile]:
    """The files of a split, downloaded if they are not in the cache.

    Raises:
        UserError: no such dataset, revision, subset or split; no network, and not or not whole in the cache; or files
            of a form that is not read.
    """
    folder = snapshot(source)
    paths = split_files(folder, source)
    shown_as = f"{source.path}@{folder.name[:7]}"
    files = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        base = PurePosixPath(source.root) if source.root is not None else PurePosixPath(name).parent
        if ".." in base.parts or base.is_absolute():
            raise UserError(f"data: root {shown(source.root)} of {source.path} is no folder within it (correct it)")
        files.append(replace(data_file(path, f"{shown_as}/{name}"), root=Snapshot(folder, base)))
    check_shards(one_form(files, shown_as), shown_as)
    return files


def snapshot(source: SourceConfig) -> Path:
    """The folder of the commit in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = source.path.removeprefix(HUB)
    if not NAME.match(name) or ".." in name:
        raise UserError(f"data: {source.path} names no dataset of the hub (write {HUB}OWNER/NAME, and split apart)")
    at = f" at revision {source.revision}" if source.revision else ""
    command = f"hf download {name} --repo-type dataset" + (f" --revision {source.revision}" if source.revision else "")
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", revision=source.revision))
    except IncompleteSnapshotError as error:
        fix = f"where there is a network: {command}"
        raise UserError(
            f"data: {source.path}{at} is not whole in the cache, and the hub is out of reach ({fix})"
        ) from error
    except LocalEntryNotFoundError as error:
        fix = f"where there is a network: {command}"
        raise UserError(f"data: {source.path}{at} is not in the cache, and the hub is out of reach ({fix})") from error
    except GatedRepoError as error:
        raise UserError(
            f"data: {source.path}{at} is gated (ask for access on its page, and log in: hf auth login)"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(f"data: the hub has no {source.path}{at} that you may read (correct it, or log in)") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"data: {source.path}{at} cannot be downloaded: {one_line(error)} (by hand: {command})"
        ) from error
    return folder


def split_files(folder: Path, source: SourceConfig) -> list[Path]:
    """The files that a dataset's card, or the names of its files, give a split: what `datasets` would read."""
    import datasets

    wanted = source.split or TRAIN
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as unused:
            builder = datasets.load_dataset_builder(str(folder), name=source.subset, cache_dir=unused)
    except Exception as error:  # of the card, which anybody may have written, it raises anything
        raise UserError(f"data: {source.path}: {one_line(error)} (set subset, or give the files by a path)") from error
    found = {str(split): files for split, files in (builder.config.data_files or {}).items()}
    if wanted not in found:
        splits = ", ".join(found) or "none"
        raise UserError(f"data: {source.path} has no split {shown(wanted)} (set split to one of: {splits})")
    paths = [Path(os.path.normpath(file)) for file in found[wanted]]  # not resolved: files of a snapshot are links
    if outside := next((path for path in paths if not path.is_relative_to(folder)), None):
        raise UserError(
            f"data: the card of {source.path} names {shown(str(outside))}, outside of it (use another dataset)"
        )
    return sorted(paths)
