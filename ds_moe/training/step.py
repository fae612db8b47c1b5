"""One optimizer step: accumulation, the loss over the global batch, and steps that must not be taken."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe.checkpoint.progress import Progress
from ds_moe.data.batch import Batch
from ds_moe.distributed import Topology, over_ranks, raise_together
from ds_moe.errors import UserError
from ds_moe.faults.signals import agreed
from ds_moe.moe.all_to_all import ExpertParallel
from ds_moe.moe.balance import Occupancy
from ds_moe.moe.loss_free import check_biases_agree, update_biases
from ds_moe.monitor.reports import StepReport
from ds_moe.tasks.task import Task, TrainingParts
from ds_moe.training.expert_load import counts_so_far
from ds_moe.training.run import SKIPPED_STEPS, Run

BIAS_CHECK_EVERY = 50  # steps; a comparison of 8 bytes a rank


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step came to, over all ranks but for `own_loss`."""

    loss: float  # mean over the global batch of what the task minimises
    aux_loss: float  # the balancers' losses, mean over the micro-batches of all ranks that hold samples
    sent_bytes: float  # rows sent to other ranks' experts, mean over ranks
    lr: float
    tokens: int  # neither padding nor samples that only fill up a batch are counted
    taken: bool  # False where a NaN or infinity was met: weights, moments and biases are as before the step
    own_loss: float  # of this rank's micro-batches, to tell who met a NaN
    extra: list[float]  # the caller's numbers, summed


def optimizer_step(
    parts: TrainingParts,
    task: Task,
    micro_batches: list[Batch],
    progress: Progress,
    *,
    bad_record: str | None = None,
    extra: Callable[[], Sequence[float]] = lambda: (),
    at: Callable[[str], None] = lambda phase: None,
) -> StepOutcome:
    """One optimizer step over any number of micro-batches, the same on every rank; the loss is the mean over the
    global batch's tokens.

    With a NaN or an infinity in the loss or in a gradient of any rank no rank takes the step; the schedule and
    `progress` go on.

    Args:
        micro_batches: of this rank, on its device.
        bad_record: what this rank met while loading, which ends the run on every rank.
        extra: numbers of the caller that are summed over ranks in the same reduction; called after the last backward.
        at: is told what the rank does next.

    Raises:
        UserError: on every rank, when any met a bad record.
    """
    engine, device = parts.engine, parts.topology.device
    at("count of the batch's tokens")
    labels, tokens, occupancy = _global_counts(task, micro_batches, bad_record, parts.topology)
    # The losses are averaged over ranks and micro-batches; each is divided so that the average is the mean.
    share = max(labels, 1) / (parts.topology.world_size * len(micro_batches))
    if parts.context is not None:
        parts.context.occupancy = occupancy
    lr = engine.get_lr()[-1]  # of the last group, whose rate is train.lr unless there is none beside Muon's
    losses = torch.zeros(2, dtype=torch.float64, device=device)  # language, auxiliary
    ep = parts.layers[0].dispatcher.ep if parts.layers else ExpertParallel()
    ep.sent_bytes = 0
    for number, batch in enumerate(micro_batches, start=1):
        engine.set_gradient_accumulation_boundary(number == len(micro_batches))  # another step may have more, or fewer
        at("forward")
        losses += _forward_backward(parts, task, batch, share, len(micro_batches), at)
        at("optimizer")
        engine.step()
    taken = engine.was_step_applied()
    if taken:
        update_biases(parts.balancings, progress=progress.step / progress.total_steps)
    else:
        for balancing in parts.balancings:
            balancing.counts_E.zero_()
        engine.lr_scheduler.step()  # the schedule is a function of the step; DeepSpeed holds it back with the weights
    if progress.step % BIAS_CHECK_EVERY == 0:
        check_biases_agree(parts.balancings, progress.step + 1)
    sums = torch.cat([losses, losses.new_tensor([ep.sent_bytes, *extra()])])
    own_loss = losses.sum().item() if not taken else 0.0
    at("sums over ranks")
    dist.all_reduce(sums)
    loss, aux_loss, sent_bytes = (sums[:3] / parts.topology.world_size).tolist()
    progress.step += 1
    progress.figures.aux_loss, progress.figures.ep_sent_bytes = aux_loss, sent_bytes
    return StepOutcome(loss, aux_loss, sent_bytes, lr, tokens, taken, own_loss, sums[3:].tolist())


def train_step(run: Run, steps: Iterator[list[Batch]]) -> StepReport:
    """The next step of a run, with what the loop must know of it: signals, written files, samples of a skipped step."""
    began = time.perf_counter()
    parts, progress = run.parts, run.progress
    run.watch.at("data", step=progress.step + 1)
    micro_batches = [batch.to(parts.topology.device) for batch in next(steps)]
    data_wait_s = time.perf_counter() - began - run.task.scoring_s
    run.load_before_step = counts_so_far(parts.layers)

    def votes() -> list[float]:
        return [float(run.saving is None or run.saving.written), *run.stop.votes()]

    outcome = optimizer_step(
        parts, run.task, micro_batches, progress, bad_record=parts.stream.error, extra=votes, at=run.watch.at
    )
    written, *signals = outcome.extra
    run.all_written = written == parts.topology.world_size
    run.stopping = run.stopping or agreed(signals)
    if not outcome.taken:
        _write_skipped(run, outcome.own_loss)
    return StepReport(
        step=progress.step,
        loss=outcome.loss,
        lr=outcome.lr,
        grad_norm=float(run.engine.get_global_grad_norm() or 0.0),
        tokens=outcome.tokens,
        samples=run.config.train.global_batch_size,
        step_s=time.perf_counter() - began,
        data_wait_s=data_wait_s,
        sent_bytes=outcome.sent_bytes,
        task=run.task.metrics(progress),
        task_name=run.kind.name,
        taken=outcome.taken,
        fill=_fill(run, outcome.tokens, len(micro_batches)),
    )


def _fill(run: Run, tokens: int, micro_batches: int) -> float | None:
    """The share of real tokens in what the step's packed rows can hold; None: rows are padded."""
    config = run.config
    room = config.tokens_per_row * micro_batches * run.parts.topology.data_ranks
    return tokens / room if config.data.packing else None


def _forward_backward(
    parts: TrainingParts, task: Task, batch: Batch, share: float, micro_batches: int, at: Callable[[str], None]
) -> Tensor:
    """(2,) what one of `micro_batches` adds to this rank's language and auxiliary loss."""
    context = parts.context
    if context is not None:
        context.real_BS = None if batch.whole else batch.real_of_token
        context.kind_BS = batch.kind_of_token
        context.sequence_BS, context.sequences = batch.sequence_of_token, batch.samples
    language = task.loss(batch, share)
    auxiliary = sum(context.aux_losses) if context is not None and context.aux_losses else None
    total = language if auxiliary is None else language + auxiliary
    at("backward")
    # Every gradient becomes NaN when the loss is not finite, so that no rank takes the step.
    finite = total * torch.where(total.detach().isfinite(), 1.0, float("nan"))
    parts.engine.backward(finite / micro_batches, scale_wrt_gas=False)
    of_balancers = language.new_zeros(()) if auxiliary is None else auxiliary
    return torch.stack([language.detach().double(), of_balancers.detach().double()]) / micro_batches


def _global_counts(
    task: Task, micro_batches: list[Batch], bad_record: str | None, topology: Topology
) -> tuple[int, int, Occupancy]:
    """(what the loss is a mean over, real tokens, how full the micro-batches are) of this step over all ranks; raises
    if any met a bad record."""
    labels = sum(task.weight(batch) for batch in micro_batches)
    tokens = sum(batch.tokens for batch in micro_batches)
    # A row that ranks share has a micro-batch on each of them: part of its labels, and all of its samples.
    samples_M = torch.stack([batch.real_B.sum() for batch in micro_batches])
    counts = torch.tensor([int(bad_record is not None), 0, 0, 0], device=topology.device)
    for place, count in enumerate((labels, tokens, samples_M.sum()), start=1):
        counts[place] += count
    counts = torch.cat([counts, samples_M > 0])
    dist.all_reduce(counts)
    bad, labelled, real, samples, *ranks_M = counts.tolist()
    if bad:
        raise_together(bad_record)
    return labelled, real, _occupancy(samples, ranks_M, topology.world_size)


def _occupancy(samples: int, ranks_M: list[int], world_size: int) -> Occupancy:
    """`ranks_M`: in each of the M micro-steps, on how many ranks there are samples. A step without any counts as one of
    a single sample."""
    micro_batches, micro_steps = world_size * len(ranks_M), sum(ranks > 0 for ranks in ranks_M)
    return Occupancy(
        sequences=max(samples, 1) / micro_batches,
        micro_batches=max(sum(ranks_M), 1) / micro_batches,
        micro_steps=max(micro_steps, 1) / len(ranks_M),
    )


def _write_skipped(run: Run, own_loss: float) -> None:
    """Write down the samples of a step that was not taken (collective)."""
    step, file = run.progress.step, run.folder / SKIPPED_STEPS
    by_rank = over_ranks(own_loss)
    if run.parts.topology.rank == 0:
        samples = run.parts.stream.samples_of(step - 1 - run.progress.file_from)
        both = enumerate(zip(by_rank, samples, strict=True))
        ranks = [{"rank": rank, "loss": str(loss), "samples": own} for rank, (loss, own) in both]
        with file.open("a") as lines:
            lines.write(json.dumps({"step": step, "ranks": ranks}) + "\n")
    suspects = [rank for rank, loss in enumerate(by_rank) if not torch.tensor(loss).isfinite()]
    what = f"the loss of rank {', '.join(map(str, suspects))}" if suspects else "a gradient"
    run.monitor.note(f"step {step} not taken: {what} is NaN or infinite (samples in {file})")


def check_skipped(run: Run) -> None:
    """Raises `UserError` on every rank after `train.max_skipped` steps in a row that were not taken."""
    count, step = run.session.skipped_in_a_row, run.progress.step
    if count > run.config.train.max_skipped:
        raise UserError(
            f"steps {step - count + 1} to {step}: a NaN or infinite loss or gradient in each, more than "
            f"train.max_skipped {run.config.train.max_skipped} in a row; their samples are in "
            f"{run.folder / SKIPPED_STEPS}, the newest checkpoint is {run.progress.figures.checkpoint or 'none yet'}"
        )
