"""`python -m ds_moe.train RUN.yaml [key=value ...]`, started once a rank by `deepspeed` or `torchrun`: the loop.

Exit status: 0 the run is complete; 1 it crashed; 2 it cannot go on as it is written, one line says why; 3 the watchdog
has ended it; 4 no rollout engine answers any more, with a checkpoint; 128 + a signal: stopped by it, with a checkpoint.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NoReturn

import torch.distributed as dist

from ds_moe.config.run import RunConfig
from ds_moe.config.run_file import dump, load_run
from ds_moe.data.batch import Batch
from ds_moe.errors import UserError, printed
from ds_moe.faults.signals import Stopped
from ds_moe.monitor.meters import max_vio
from ds_moe.monitor.reports import EvalReport, RoutingReport
from ds_moe.rollout.engine import EnginesGone
from ds_moe.tasks.registry import task_kind
from ds_moe.training.checkpoints import finish_saving, keep_best_newest, resume, save_checkpoint
from ds_moe.training.expert_load import reduce_load
from ds_moe.training.run import Run
from ds_moe.training.set_up import set_up
from ds_moe.training.step import check_skipped, train_step
from ds_moe.training.summary import result_rows, run_summary

ENGINES_GONE = 4  # exit status
SAID_WITHIN_S = 60.0  # seconds that the first rank of a host may take longer than the others to read the run file


def main(argv: list[str] | None = None) -> int:
    """The exit status, see above."""
    arguments = [argument for argument in (argv or sys.argv[1:]) if not argument.startswith("--local_rank")]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    return status_of(lambda: load_run(arguments[0], arguments[1:]), train)


def status_of(load: Callable[[], RunConfig], work: Callable[[RunConfig], object]) -> int:
    """Load a run, do what this rank is for, and return the exit status, see above; an error is said here."""
    try:
        config = load()
    except UserError as error:
        # One rank of a host says it, since each host reads a file of its own. The others wait until their launcher ends
        # them: it ends all ranks with the first, which might be the one that speaks.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(printed(error), file=sys.stderr, flush=True)
        else:
            time.sleep(SAID_WITHIN_S)
        return 2
    try:
        work(config)
    except UserError as error:
        print(printed(error), file=sys.stderr, flush=True)
        return 2
    except Stopped as stopped:
        dist.destroy_process_group()
        return stopped.exit_status
    except EnginesGone as gone:
        print(f"error: rl.engine: {gone}", file=sys.stderr, flush=True)
        dist.destroy_process_group()
        return ENGINES_GONE
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
        EnginesGone: the same, because no server samples for it any more.
    """
    run, complete = set_up(config), False
    progress = run.progress
    try:
        with run.watch.telling_place():
            resume(run)
            run.monitor.start(progress.step + 1, run_summary(run), dump(config))
            if progress.step >= progress.total_steps:
                done = f"all {progress.total_steps} steps are done"
                run.monitor.note(f"{done}: nothing to train ({way_on(config)} to go on)")
            run.stop.wait_for_step()
            train_steps(run)
            finish(run)
            complete = True
    finally:
        run.task.close()
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
            try:
                one_step(run, steps)
            except Stopped as stopped:  # while the ranks waited for rollouts; no step was begun
                run.stopping = stopped.signal
            except EnginesGone:
                save_checkpoint(run)
                finish_saving(run)
                raise
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
    keep_best_newest(run)


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
        report = run.task.evaluate(run.progress.step, limit, each_batch=lambda: run.parts.turn("evaluation"))
    except Stopped as stopped:
        run.stopping = stopped.signal
        return False
    run.progress.evaluation_due = False
    run.monitor.evaluated(report)
    run.progress.figures.eval_loss, run.progress.figures.accuracy = report.loss, report.accuracy
    return best_so_far(run, report)


def best_so_far(run: Run, report: EvalReport) -> bool:
    """With `train.patience`: whether this evaluation's weights are the ones to keep. The result stays that of the best
    ones."""
    if run.patience is None:
        return False
    progress = run.progress
    better = run.patience.note(report.loss, progress.figures)
    progress.best_loss, progress.waited = run.patience.best, run.patience.waited
    if better:
        progress.best, progress.best_checkpoint = run.patience.figures, None  # until it is saved
    else:
        progress.figures = replace(run.patience.figures, checkpoint=progress.figures.checkpoint)
    if run.patience.exhausted:
        best = f"held-out loss {run.patience.best:.4f} after step {progress.figures.step}"
        waited = f"{run.patience.waited} evaluations without a better one"
        run.monitor.note(f"step {progress.step}: {waited} than the {best}")
    return better


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
