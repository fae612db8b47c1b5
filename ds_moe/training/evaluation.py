"""An evaluation of its own: weights and no optimizer, the forwards and answers of a training's evaluation, two files.

What it writes are `<out>.jsonl`, a line for every sample in the order of data.eval, and `<out>.json`, the result.
"""

import json
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console

from ds_moe.checkpoint.changes import changes_of_evaluation
from ds_moe.checkpoint.files import step_folders
from ds_moe.checkpoint.restore import find_together, load_weights
from ds_moe.checkpoint.room import unwritable
from ds_moe.config.check import check_model
from ds_moe.config.deepspeed import precision, resolve_without_optimizer
from ds_moe.config.run import RunConfig, task_section
from ds_moe.config.sections import sources_named
from ds_moe.data.chat import BadRecord
from ds_moe.data.eval_set import EvalSet
from ds_moe.distributed import Topology, over_ranks, raise_together
from ds_moe.engine.build import build_without_optimizer
from ds_moe.engine.start import on_cpu, start_distributed
from ds_moe.errors import UserError
from ds_moe.faults.signals import StopRequest
from ds_moe.faults.watchdog import Watchdog, watch_job
from ds_moe.models.attention import check_packable
from ds_moe.models.families import PRESETS
from ds_moe.models.load import experts_of, model_config, processor_of
from ds_moe.monitor.progress import SampleCount, print_table
from ds_moe.monitor.reports import EvalReport
from ds_moe.tasks.answers import Answered
from ds_moe.tasks.registry import task_kind
from ds_moe.tasks.task import TrainingParts
from ds_moe.training.eval_files import not_replaceable, partial_of, result_file, write_result, written_whole
from ds_moe.training.set_up import load_prepared, seed_everything

SHOWN_BAD = 5  # bad records that are said; the result file has all of them


@dataclass(frozen=True)
class Weights:
    """What is evaluated: a checkpoint upon the run's model, or another model in its place."""

    source: str
    name: str  # for the names of files
    config: RunConfig
    checkpoint: Path | None = None


def evaluate_run(
    config: RunConfig, source: str | None = None, out: str | None = None, limit: int | None = None
) -> dict[str, object]:
    """Evaluate, print a table and write two files; what the second one holds (collective).

    No file of the run's output folder is read but checkpoints, and none is changed.

    Args:
        source: a checkpoint, a run's output folder, or what `model.path` or `model.preset` may be; None: the newest
            checkpoint of `train.output_dir`.
        out: the file for the samples, which ends in .jsonl; None: `eval-<checkpoint or model>.jsonl` in
            `train.output_dir`, with `limit` behind the name where there is one.
        limit: samples to use, over all ranks; None: all.

    Raises:
        UserError: weights that cannot be found, do not fit or are damaged; a bad record under `on_bad_record: stop`.
    """
    topology = start_distributed(config.moe.ep_size if config.moe else 1, lambda: experts_of(config.model))
    watch = watch_job(topology.rank, topology.world_size, config.train.watchdog_s)
    at_once = "in an evaluation, which saves nothing"
    stop = StopRequest(topology.rank, 0.0, lambda: str(watch.place), at_once)
    complete = False
    try:
        with watch.telling_place(), tempfile.TemporaryDirectory(prefix="ds_moe_eval_") as scratch:
            weights = find_weights(config, source, topology)
            part = f"-{limit}" if limit else ""  # beside the result of all samples, not in its place
            file = Path(out or Path(config.train.output_dir, f"eval-{weights.name}{part}.jsonl"))
            stop.leftovers += [Path(scratch), partial_of(file)]
            raise_together(_unusable(file) if topology.rank == 0 else None)
            result = _evaluate(weights, Path(scratch), file, limit, topology, watch)
        complete = True
    finally:
        stop.close()
        watch.close(complete)
    return result


def find_weights(config: RunConfig, source: str | None, topology: Topology) -> Weights:
    """What `source` means, see `evaluate_run` (collective). Raises `UserError` where it means nothing."""
    own = Path(config.train.output_dir)
    if source is None and not step_folders(own / "checkpoints"):
        text = f"train.output_dir {own} holds no checkpoint; name what to evaluate: --from FOLDER"
        raise UserError(f"{config.at('train.output_dir')}: {text}")
    path = Path(source) if source is not None else own
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            fix = "give the checkpoint it is of, or export that without --adapter"
            raise UserError(f"--from {path} is a PEFT adapter, not a model: {fix}")
        found = find_together(path, topology, lambda text: _say(topology, text))
        run = found.resolve().parent.parent
        name = found.name if run == own.resolve() else f"{run.name}-{found.name}"
        return Weights(str(found), name, config, found)
    preset = not path.exists() and source in PRESETS
    model = config.model.model_copy(update={"preset": source if preset else None, "path": None if preset else source})
    try:
        model_config(model)
    except UserError as error:
        raise UserError(f"--from {source} is no checkpoint, run, preset or model: {error}") from error
    if lacking := task_section(config).needs_more_than_a_model():
        raise UserError(f"--from {source} is a model, and {lacking}: give a checkpoint of the run")
    # A model holds all that it has learned, so there is nothing for a lora section to add to it.
    return Weights(str(source), path.resolve().name, config.model_copy(update={"model": model, "lora": None}))


def _evaluate(
    weights: Weights, scratch: Path, file: Path, limit: int | None, topology: Topology, watch: Watchdog
) -> dict[str, object]:
    parts, step = _set_up(weights, scratch, topology)
    config, eval_set = weights.config, parts.eval_set
    total = min(limit or len(eval_set), len(eval_set))
    zero = parts.engine.zero_optimization_stage()
    sharded = f"weights sharded by ZeRO-{zero}" if zero else "weights not sharded"
    ranks = f"{topology.world_size} ranks on {topology.device.type}, ep_size {topology.ep_size}, {sharded}"
    _say(topology, f"evaluating {weights.source} on {total} samples of {sources_named(config.data.eval)}: {ranks}")
    with _samples(file, total, eval_set, topology) as samples:
        task = task_kind(config).make(parts)
        report = task.evaluate(step or 0, limit, each_batch=lambda: watch.at("evaluation"), note=samples.add)
        bad = {record for of_rank in over_ranks(eval_set.skipped) for record in of_rank}
        bad = sorted(bad, key=lambda record: (len(record.where), record.where))  # line 7 before line 12
    watch.at("end", timed=False)
    result = {
        "from": weights.source,
        "step": step,
        "data": sources_named(config.data.eval),
        "eval_loss": report.loss,
        "accuracy": report.accuracy or None,
        "samples": samples.count,
        "asked": dict(sorted(samples.asked.items())),
        "right": {kind: samples.right[kind] for kind in sorted(samples.asked)} if report.accuracy else None,
        "bad_records": [asdict(record) for record in bad],
        "world_size": topology.world_size,
        "ep_size": topology.ep_size,
        "precision": precision(config, on_cpu()),
    }
    result = {key: value for key, value in result.items() if value is not None}
    if topology.rank == 0:
        write_result(result, result_file(file))
        print_table(_rows(report, samples, bad, file), f"{weights.source} on {sources_named(config.data.eval)}")
    parts.engine.destroy()
    return result


def _set_up(weights: Weights, scratch: Path, topology: Topology) -> tuple[TrainingParts, int | None]:
    """What a task needs to evaluate, and the checkpoint's step (collective).

    What would go to the run's output folder (caches, lists of bad records) goes to a host's first `scratch`.
    """
    host = socket.gethostname()
    shared = next(folder for name, folder in over_ranks((host, str(scratch))) if name == host)
    if weights.checkpoint is not None:
        for line in changes_of_evaluation(weights.checkpoint, weights.config):
            _say(topology, line)
    train = weights.config.train.model_copy(update={"output_dir": shared})
    monitor = weights.config.monitor.model_copy(update={"sample_images": 0})
    config = weights.config.model_copy(update={"train": train, "monitor": monitor})
    seed_everything(config.train.seed)
    kind, named = task_kind(config), model_config(config.model)
    processor = processor_of(config.model, config.data.video)
    check_model(config, named)
    check_packable(config, named)
    ranks = {"rank": topology.rank, "world_size": topology.world_size, "raise_errors": False}
    eval_set = EvalSet(config, processor, **ranks, record_kind=kind.eval_records(config))
    ds_config = resolve_without_optimizer(config, on_cpu(), named.get_text_config().hidden_size)
    model, context = load_prepared(config, topology, processor, ds_config)
    engine, step = build_without_optimizer(model, ds_config), None
    if weights.checkpoint is not None:
        step = load_weights(engine.module, topology, weights.checkpoint, kind.base(config))["step"]

    def say(text: str) -> None:
        _say(topology, text)

    return TrainingParts(config, topology, engine, context, processor, eval_set=eval_set, note=say), step


class Samples:
    """The samples of all ranks: rank 0 writes each as a line, in the order of data.eval, and all ranks count them."""

    def __init__(self, lines: TextIO | None, progress: SampleCount | None, eval_set: EvalSet) -> None:
        self.asked: Counter[str] = Counter()  # samples by kind
        self.right: Counter[str] = Counter()
        self._lines, self._progress, self._eval_set = lines, progress, eval_set

    @property
    def count(self) -> int:
        return self.asked.total()

    def add(self, own: list[Answered]) -> None:
        """Add this rank's samples of a batch (collective). Raises `UserError` when any rank has met a bad record."""
        of_ranks, errors = zip(*over_ranks((own, self._eval_set.error)), strict=True)
        if found := [error for error in errors if error]:
            raise UserError("; ".join(found))
        for one in [one for of_rank in of_ranks for one in of_rank]:  # ranks have neighbouring slices of the file
            self.asked[one.kind or "all"] += 1
            self.right[one.kind or "all"] += bool(one.right)
            if self._lines is not None:
                self._lines.write(json.dumps(asdict(one) | {"right": one.right}, ensure_ascii=False) + "\n")
        if self._progress is not None:
            self._progress.done(self.count)


@contextmanager
def _samples(file: Path, total: int, eval_set: EvalSet, topology: Topology) -> Iterator[Samples]:
    """On rank 0 with the file and a progress display. The file has its name once it is complete."""
    if topology.rank != 0:
        yield Samples(None, None, eval_set)
        return
    progress = SampleCount(Console(), total)
    try:
        with written_whole(file) as lines:
            yield Samples(lines, progress, eval_set)
    finally:
        progress.close()


def _unusable(file: Path) -> str | None:
    return unwritable(file.parent, "the folder of --out,") or not_replaceable(file)


def _rows(report: EvalReport, samples: Samples, bad: Sequence[BadRecord], file: Path) -> dict[str, str]:
    """What the closing table says: name -> value."""
    rows = {"held-out loss": f"{report.loss:.4f}"}
    for kind, share in report.accuracy.items():
        of = "" if kind == "mean" else f"  ({samples.right[kind]} of {samples.asked[kind]})"
        rows[f"held-out accuracy, {kind}"] = f"{share:.3f}{of}"
    rows["samples"] = f"{samples.count} (in {file})"
    if bad:
        more = [f"and {len(bad) - SHOWN_BAD} more"] if len(bad) > SHOWN_BAD else []
        rows["bad records skipped"] = "\n".join([str(len(bad)), *map(str, bad[:SHOWN_BAD]), *more])
    rows["result"] = str(result_file(file))
    return rows


def _say(topology: Topology, text: str) -> None:
    if topology.rank == 0:
        print(text, file=sys.stdout, flush=True)
