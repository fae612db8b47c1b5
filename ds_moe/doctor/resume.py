"""Checks of what a run would go on from, as the run itself makes them before it loads anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ds_moe.doctor.case import Case, Finding
from ds_moe.doctor.run import GIVEN
from ds_moe.errors import UserError

if TYPE_CHECKING:
    from ds_moe.checkpoint.fit import Resumption


def find_checkpoint(case: Case) -> Iterator[Finding]:
    """The checkpoint that `train.resume` means; sets `case.checkpoint`. Its files are there, but no content is read."""
    from ds_moe.checkpoint.files import incomplete, step_folders
    from ds_moe.checkpoint.fit import chosen

    config = case.config
    folder, notes = Path(config.train.output_dir) / "checkpoints", []
    try:
        case.checkpoint = chosen(config.train.resume, folder, step_folders(folder), incomplete, notes.append)
    except UserError as error:
        yield Finding("error", f"{config.at('train.resume')}: {error}", notes)
        return
    yield from (Finding("warning", f"{config.at('train.resume')}: {note}") for note in notes)


def check_room(case: Case) -> Iterator[Finding]:
    """The size of the run's checkpoints against what is free on the disk of its output folder."""
    from ds_moe.checkpoint.room import checkpoint_bytes, no_room, outlook, soon_full
    from ds_moe.models.matrices import by_muon
    from ds_moe.models.stored_names import Carried
    from ds_moe.tasks.registry import task_kind

    config = case.config
    if case.outline is None or case.zero is None:
        return
    with_frozen = task_kind(config).base(config) is None
    matrices = by_muon(case.outline, config)
    size = checkpoint_bytes(case.outline, 1, with_frozen, case.zero.width, matrices)
    size += Carried(case.outline, case.files if with_frozen else None).nbytes
    folder, keep, where = Path(config.train.output_dir, "checkpoints"), config.checkpoint.keep, config.at("checkpoint")
    if problem := no_room(folder, size):
        elsewhere = case.device.source == GIVEN  # the job runs on another machine, whose disk this one does not see
        level = "warning" if elsewhere else "error"
        yield Finding(level, f"{config.at('train.output_dir')}: train.output_dir {problem}")
    elif soon_full(folder, size, keep):
        text = f"{where}: checkpoints take {outlook(folder, size, keep)}; lower checkpoint.keep, or free some"
        yield Finding("warning", text)
    else:
        yield Finding("ok", f"checkpoints: {outlook(folder, size, keep)}")


def check_resume(case: Case) -> Iterator[Finding]:
    """Everything for which the run would refuse that checkpoint; otherwise what has changed since."""
    from ds_moe.checkpoint.changes import changes
    from ds_moe.checkpoint.files import STATE
    from ds_moe.checkpoint.fit import misfits

    path, where = case.checkpoint, case.config.at("train.resume")
    if path is None:
        return
    try:
        problems = misfits(path, _resumption(case, path))
    except UserError as error:
        problems = [str(error)]
    yield from (Finding("error", f"{where}: {problem}") for problem in problems)
    if not problems:
        state = json.loads((path / STATE).read_text())
        saved_by = f"{state['world_size']} ranks with ep_size {state['ep_size']}"
        text = f"resume: from {path} at step {state['step']} (saved by {saved_by})"
        yield Finding("ok", text, changes(path, case.config))


def _resumption(case: Case, path: Path) -> Resumption:
    from ds_moe.checkpoint.files import read_manifest
    from ds_moe.checkpoint.fit import Resumption
    from ds_moe.data.position import order_of
    from ds_moe.models.convert import convert_for
    from ds_moe.models.ties import untie
    from ds_moe.tasks.registry import task_kind

    kind, model = task_kind(case.config), case.outline
    if model is not None:
        if case.folder is not None:  # whether its files keep the tie, their values tell; the checkpoint knows
            untie(model, {key.removeprefix("weight/") for key in read_manifest(path)["tensors"]})
        convert_for(model, case.config)
    base = kind.base(case.config) if model is not None else None
    return Resumption(case.config, model, 1, base, case.order or order_of(case.config), kind.files_follow)
