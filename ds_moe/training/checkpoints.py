"""Saves a run, and goes on from what was saved."""

from pathlib import Path

import deepspeed
import torch
from torch import Tensor

from ds_moe.checkpoint.changes import changes
from ds_moe.checkpoint.files import step_name
from ds_moe.checkpoint.fit import Resumption, misfits
from ds_moe.checkpoint.restore import choose, load
from ds_moe.checkpoint.save import Saving, forget_later
from ds_moe.config.deepspeed import precision
from ds_moe.config.run_file import write_run
from ds_moe.data.position import same_file
from ds_moe.distributed import Topology, together
from ds_moe.engine.start import on_cpu
from ds_moe.errors import all_in_one
from ds_moe.models.processor import save_processor
from ds_moe.models.stored_names import Carried
from ds_moe.training.run import Run

ELSEWHERE = (
    ""  # in place of the name of the best evaluation's checkpoint: the run began in another folder, which has it
)


def resume(run: Run) -> None:
    """Go on from the checkpoint that `train.resume` means, whatever topology wrote it."""
    parts, progress = run.parts, run.progress
    path = choose(run.config.train.resume, run.folder / "checkpoints", parts.topology, note=run.monitor.note)
    if path is None:
        return
    order, follow = parts.stream.order, run.kind.files_follow
    wanted = Resumption(run.config, run.engine.module, parts.topology.ep_size, run.base, order, follow)
    [problems, *_] = together(parts.topology, f"compare the run with {path}", lambda: misfits(path, wanted))
    if problems:
        raise all_in_one(problems)
    state = load(run.engine, parts.topology, path, with_frozen=run.base is None)
    progress.resume(state, run.kind.name)
    progress.figures.checkpoint = str(path)
    progress.evaluation_due = progress.evaluation_due and parts.eval_set is not None
    next_file = follow and not same_file(state["data"], order)
    if next_file:
        progress.file_from = progress.step
    else:
        parts.stream.load_state_dict(state["data"])
    if run.config.train.epochs is not None:
        progress.total_steps += progress.file_from
        run.monitor.total_steps = progress.total_steps
    wait_on(run, path)
    saved_by = f"{state['world_size']} ranks with ep_size {state['ep_size']}"
    also = ", with the next rollout file" if next_file else ""
    run.monitor.note(f"resumed from {path} at step {progress.step} (saved by {saved_by}){also}")
    for line in changes(path, run.config):
        run.monitor.note(line)


def wait_on(run: Run, path: Path) -> None:
    """With `train.patience`: for an evaluation better than the best one of the run that saved the checkpoint `path`."""
    progress = run.progress
    if run.patience is None or progress.best_loss is None:
        return
    run.patience.go_on(progress.best_loss, progress.best or progress.figures, progress.waited)
    if progress.best_checkpoint and path.resolve().parent != (run.folder / "checkpoints").resolve():
        progress.best_checkpoint = ELSEWHERE  # one of that name here is another run's
        run.monitor.note(f"the checkpoint of the best evaluation so far stays in {path.parent}")


def save_checkpoint(run: Run) -> None:
    """Save the run as it is after the last step; with `checkpoint.background` its files follow later, while one that
    is still being written is waited for first (collective)."""

    def write_extras(folder: Path) -> None:
        write_run(run.config, folder)
        model = run.engine.module
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder / "model")
        if model.can_generate():
            model.generation_config.save_pretrained(folder / "model")
        save_processor(run.parts.processor, folder / "model")

    finish_saving(run)
    run.watch.at("checkpoint")
    progress = run.progress
    if progress.best is not None and progress.best_checkpoint is None:
        progress.best_checkpoint = step_name(progress.step)
    state = {
        **progress.as_json(run.kind.name),
        "data": run.parts.stream.state_dict(),
        "precision": precision(run.config, on_cpu()),
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
    }
    folder, keep = run.folder / "checkpoints", run.config.checkpoint.keep
    carried = read_carried(run.carried, run.parts.topology, run.config.model.path)
    run.saving = Saving(
        run.engine,
        run.parts.topology,
        folder,
        state,
        write_extras,
        keep,
        run.base,
        carried,
        best=progress.best_checkpoint,
        progress=run.watch.pulse,
    )
    if not run.config.checkpoint.background:
        finish_saving(run)


def read_carried(carried: Carried, topology: Topology, path: str | None) -> dict[str, Tensor]:
    """This rank's share of what is carried (collective). Raises `UserError` on all ranks if one cannot read its own."""
    share: dict[str, Tensor] = {}
    if carried.names:
        what = (
            f"read {carried.names[0]} and others, which checkpoints hold too, from model.path {path!r}; keep its files"
        )
        together(topology, what, lambda: share.update(carried.share(topology.rank, topology.world_size)))
    return share


def finish_saving(run: Run) -> None:
    """Make the checkpoint that is in flight, if one is, whole (collective)."""
    if run.saving is None:
        return
    run.watch.at("checkpoint's files")
    path = run.saving.finish(run.watch.pulse)
    run.saving = None
    run.progress.figures.checkpoint = str(path)
    run.monitor.note(f"checkpoint {path}")


def keep_best_newest(run: Run) -> None:
    """At the end of a run with `train.patience`: its newest checkpoint is the best evaluation's, also where a signal
    has stopped the run behind that and left a later one (collective)."""
    if run.patience is None or run.progress.best_checkpoint in (None, ELSEWHERE):
        return
    best = run.folder / "checkpoints" / run.progress.best_checkpoint
    forget = (lambda: forget_later(best)) if run.parts.topology.rank == 0 else lambda: None
    [found, *_] = together(run.parts.topology, f"make {best} the newest checkpoint", forget)
    if found:
        run.progress.figures.checkpoint = str(best)
