"""`python -m ds_moe.train RUN.yaml [key=value ...]`, started once a rank by `deepspeed` or `torchrun`: the loop.

Exit status: 0 the run is complete; 1 it crashed; 2 it cannot go on as it is written, one line says why; 3 the watchdog
has ended it; 128 + a signal: stopped by it, with a checkpoint.
"""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import deepspeed
import torch
import torch.distributed as dist

from ds_moe.checkpoint.restore import choose, load
from ds_moe.checkpoint.save import Saving
from ds_moe.config.deepspeed import precision
from ds_moe.config.run import RunConfig
from ds_moe.config.run_file import dump, dump_yaml, load_run
from ds_moe.data.batch import Batch
from ds_moe.engine.start import on_cpu
from ds_moe.errors import UserError
from ds_moe.faults.signals import Stopped, agreed
from ds_moe.models.processor import save_processor
from ds_moe.monitor import EvalReport, RoutingReport
from ds_moe.monitor.meters import max_vio
from ds_moe.tasks.registry import task_kind
from ds_moe.training.expert_load import reduce_load
from ds_moe.training.run import Run
from ds_moe.training.set_up import set_up
from ds_moe.training.step import check_skipped, train_step
from ds_moe.training.summary import result_rows, run_summary


def main(argv: list[str] | None = None) -> int:
    """The exit status, see above."""
    arguments = [argument for argument in (argv or sys.argv[1:]) if not argument.startswith("--local_rank")]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        train(load_run(arguments[0], arguments[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Stopped as stopped:
        dist.destroy_process_group()
        return stopped.exit_status
    except Exception:
        traceback.print_exc()
        return 1
    dist.destroy_process_group()
    return 0


def leave(status: int) -> NoReturn:
    """End this process without the interpreter's finalisation.

    That would wait for whatever an error has left open: data workers, collectives of ranks that no longer answer, a
    checkpoint that is being written. And torch 2.13 may abort in it: a thread of gloo's that outlives its process group
    terminates the process when it asks for Python's lock.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def train(config: RunConfig) -> dict[str, object]:
    """Train one run to its end; returns what the summary table shows (also in `<output_dir>/result.json`).

    Raises:
        Stopped: a signal has ended the run before, and its checkpoint is written.
    """
    run, complete = set_up(config), False
    progress = run.progress
    try:
        resume(run)
        run.monitor.start(progress.step + 1, run_summary(run), dump(config))
        if progress.step >= progress.total_steps:
            run.monitor.note(f"all {progress.total_steps} steps are done: nothing to train ({way_on(config)} to go on)")
        run.stop.wait_for_step()
        train_steps(run)
        finish(run)
        complete = True
    except OSError as error:
        raise UserError(f"rank {run.parts.topology.rank} in {run.watch.place}: {error}") from error
    except Exception as error:
        error.add_note(f"rank {run.parts.topology.rank} in {run.watch.place}")
        raise
    finally:
        run.monitor.close()
        run.parts.stream.close()
        run.stop.close()
        run.watch.close(complete)
    run.engine.destroy()
    return progress.figures.as_json(run.kind.name)


def way_on(config: RunConfig) -> str:
    """What gives a complete run more steps."""
    if task_kind(config).files_follow and not config.train.steps:
        return "give data.train the next rollouts"
    return "raise train.steps" if config.train.steps else "raise train.epochs"


def train_steps(run: Run) -> None:
    """Steps, evaluations and checkpoints until all are done, patience is exhausted, or a signal has come."""
    progress, save_due = run.progress, False
    steps = run.task.steps(progress)
    while progress.step < progress.total_steps or progress.evaluation_due:
        if not progress.evaluation_due or run.stopping:
            one_step(run, steps)
            save_due = save_due or (progress.last and run.patience is None)
            save_due = save_due or due(progress.step, run.config.checkpoint.every)
        if progress.evaluation_due and not run.stopping:
            save_due = run_evaluation(run) or save_due
        if (save_due or run.stopping) and run.task.at_boundary:
            save_checkpoint(run)
            save_due = False
        if run.stopping and run.task.at_boundary:
            finish_saving(run)
            raise Stopped(run.stopping)
        if run.patience is not None and run.patience.exhausted:
            break
    finish_saving(run)


def one_step(run: Run, steps: Iterator[list[Batch]]) -> None:
    """Train one step and report it."""
    report = train_step(run, steps)
    run.monitor.step(report, routing_report(run) if run.monitor.is_log_step(run.progress.step) else None)
    run.note_progress(report)
    check_skipped(run)
    if run.all_written:
        finish_saving(run)
    progress, evaluates = run.progress, run.parts.eval_set is not None
    progress.evaluation_due = evaluates and (progress.last or due(progress.step, run.config.train.eval_every))


def due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def resume(run: Run) -> None:
    """Go on from the checkpoint that `train.resume` means, whatever topology wrote it."""
    parts, progress = run.parts, run.progress
    path = choose(run.config.train.resume, run.folder / "checkpoints", parts.topology, note=run.monitor.note)
    if path is None:
        return
    state = load(run.engine, parts.topology, path, run.base)
    progress.resume(state, run.kind.name)
    progress.figures.checkpoint = str(path)
    progress.evaluation_due = progress.evaluation_due and parts.eval_set is not None
    next_file = run.kind.files_follow and not parts.stream.is_file_of(state["data"])
    if next_file:
        progress.file_from = progress.step
    else:
        parts.stream.load_state_dict(state["data"])
    if run.config.train.epochs is not None:
        progress.total_steps += progress.file_from
        run.monitor.total_steps = progress.total_steps
    if run.patience is not None and progress.best_loss is not None:
        run.patience.note(progress.best_loss, progress.figures)
    topology = f"{state['world_size']} ranks with ep_size {state['ep_size']}"
    run.monitor.note(
        f"resumed from {path} at step {progress.step} (saved by {topology})"
        + (", with the next rollout file" if next_file else "")
    )


def routing_report(run: Run) -> RoutingReport | None:
    """Expert loads since the last report, over all ranks (collective)."""
    parts, figures = run.parts, run.progress.figures
    report = reduce_load(parts.layers, run.load_before_step, figures.aux_loss, parts.stream.kinds)
    if report is not None:
        figures.max_vio = max_vio(report.counts_LE)
    return report


def run_evaluation(run: Run) -> bool:
    """Evaluate after the last step; whether its weights are to be kept. A signal in between puts it off until the run
    is resumed."""
    try:
        limit = None if run.progress.last else run.config.train.eval_samples
        report = run.task.evaluate(run.progress, limit, each_batch=lambda: evaluating(run))
    except Stopped as stopped:
        run.stopping = stopped.signal
        return False
    run.progress.evaluation_due = False
    run.monitor.evaluated(report)
    run.progress.figures.eval_loss, run.progress.figures.accuracy = report.loss, report.accuracy
    return best_so_far(run, report)


def evaluating(run: Run) -> None:
    """Called before every batch of an evaluation (collective).

    Raises:
        Stopped: on every rank, when any has received a signal.
    """
    run.watch.at("evaluation")
    votes = torch.tensor(run.stop.votes(), device=run.parts.topology.device)
    dist.all_reduce(votes)
    if (number := agreed(votes.tolist())) is not None:
        raise Stopped(number)


def best_so_far(run: Run, report: EvalReport) -> bool:
    """With `train.patience`: whether this evaluation's weights are the ones to keep. The result stays that of the best
    ones."""
    if run.patience is None:
        return False
    progress = run.progress
    better = run.patience.note(report.loss, progress.figures)
    progress.best_loss = run.patience.best
    if not better:
        progress.figures = replace(run.patience.figures, checkpoint=progress.figures.checkpoint)
    if run.patience.exhausted:
        best = f"held-out loss {run.patience.best:.4f} after step {progress.figures.step}"
        run.monitor.note(
            f"step {progress.step}: {run.patience.waited} evaluations without a better one than the {best}"
        )
    return better


def save_checkpoint(run: Run) -> None:
    """Save the run as it is after the last step; with `checkpoint.background` its files follow later, while one that
    is still being written is waited for first (collective)."""

    def write_extras(folder: Path) -> None:
        shutil.copy(run.config.deepspeed, folder / "deepspeed.json")
        (folder / "run.yaml").write_text(dump_yaml(run.config.model_copy(update={"deepspeed": "deepspeed.json"})))
        model = run.engine.module
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder / "model")
        if model.can_generate():
            model.generation_config.save_pretrained(folder / "model")
        save_processor(run.parts.processor, folder / "model")

    finish_saving(run)
    run.watch.at("checkpoint")
    state = {
        **run.progress.as_json(run.kind.name),
        "data": run.parts.stream.state_dict(),
        "precision": precision(run.config, on_cpu()),
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
    }
    run.saving = Saving(
        run.engine,
        run.parts.topology,
        run.folder / "checkpoints",
        state,
        write_extras,
        run.config.checkpoint.keep,
        run.base,
        run.watch.pulse,
    )
    if not run.config.checkpoint.background:
        finish_saving(run)


def finish_saving(run: Run) -> None:
    """Make the checkpoint that is in flight, if one is, whole (collective)."""
    if run.saving is None:
        return
    run.watch.at("checkpoint's files")
    path = run.saving.finish(run.watch.pulse)
    run.saving = None
    run.progress.figures.checkpoint = str(path)
    run.monitor.note(f"checkpoint {path}")


def finish(run: Run) -> None:
    """Write `result.json` and close with one table."""
    run.watch.at("end", timed=False)
    if run.parts.topology.rank == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        result = run.progress.figures.as_json(run.kind.name)
        (run.folder / "result.json").write_text(json.dumps(result, indent=1))
    run.monitor.finish(result_rows(run))


if __name__ == "__main__":
    leave(main())
