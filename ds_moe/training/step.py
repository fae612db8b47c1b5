"""One optimizer step: accumulation, the loss over the global batch, and steps that must not be taken."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe.distributed import over_ranks, raise_together, to_device
from ds_moe.errors import UserError
from ds_moe.faults.signals import agreed
from ds_moe.moe import ExpertParallel
from ds_moe.moe.loss_free import check_biases_agree, update_biases
from ds_moe.monitor import StepReport
from ds_moe.tasks.task import Batch, Supervised
from ds_moe.training.expert_load import counts_so_far
from ds_moe.training.run import SKIPPED_STEPS

if TYPE_CHECKING:
    from ds_moe.training.run import Run

BIAS_CHECK_EVERY = 50  # steps; a comparison of 8 bytes a rank


def train_step(run: Run, steps: Iterator[list[Batch]]) -> StepReport:
    """One optimizer step over `accumulation` micro-batches; the loss is the mean over the global batch's tokens.

    With a NaN or an infinity in the loss or in a gradient of any rank no rank takes the step: weights, Adam's moments
    and biases stay; the schedule and the data go on.

    Raises:
        UserError: on every rank, when any met a bad record.
    """
    began = time.perf_counter()
    device = run.topology.device
    run.watch.at("data", step=run.step + 1)
    micro_batches = [to_device(batch, device) for batch in next(steps)]
    data_wait_s = time.perf_counter() - began - run.task.scoring_s
    run.watch.at("count of the batch's tokens")
    labels, tokens = _global_counts(run.task, micro_batches, run.stream.error, device)
    # DeepSpeed averages over ranks and micro-batches; the loss of each is divided so that the average is the mean.
    share = max(labels, 1) / (run.topology.world_size * len(micro_batches))
    lr = run.engine.get_lr()[0]
    losses = torch.zeros(2, dtype=torch.float64, device=device)  # language, auxiliary
    ep = run.layers[0].dispatcher.ep if run.layers else ExpertParallel()
    ep.sent_bytes = 0
    run.load_before_step = counts_so_far(run.layers)
    for batch in micro_batches:
        run.watch.at("forward")
        losses += _forward_backward(run, batch, share) / len(micro_batches)
        run.watch.at("optimizer")
        run.engine.step()
    taken = run.engine.was_step_applied()
    if taken:
        update_biases(run.balancings, progress=run.step / run.total_steps)
    else:
        _step_not_taken(run, losses)
    if run.step % BIAS_CHECK_EVERY == 0:
        check_biases_agree(run.balancings, run.step + 1)
    written = run.saving is None or run.saving.written
    sums = torch.cat([losses, losses.new_tensor([ep.sent_bytes, written, *run.stop.votes()])])
    run.watch.at("sums over ranks")
    dist.all_reduce(sums)
    language_loss, aux_loss, sent_bytes = (sums[:3] / run.topology.world_size).tolist()
    run.all_written = sums[3].item() == run.topology.world_size
    run.stopping = run.stopping or agreed(sums[4:].tolist())
    run.step += 1
    run.skipped_in_a_row = 0 if taken else run.skipped_in_a_row + 1
    run.result |= {"aux_loss": aux_loss, "ep_sent_bytes": sent_bytes}
    return StepReport(
        step=run.step,
        loss=language_loss,
        lr=lr,
        grad_norm=float(run.engine.get_global_grad_norm() or 0.0),
        tokens=tokens,
        samples=run.config.train.global_batch_size,
        step_s=time.perf_counter() - began,
        data_wait_s=data_wait_s,
        sent_bytes=sent_bytes,
        task=run.task.metrics(run),
        task_name=run.config.task,
        taken=taken,
    )


def _forward_backward(run: Run, batch: Batch, share: float) -> Tensor:
    """(2,) the micro-batch's language and auxiliary loss."""
    real_B, kind_B = batch.pop("real"), batch.pop("kind", None)
    if run.context is not None:
        run.context.real_B, run.context.kind_B = real_B, kind_B
    language = run.task.loss(run, batch, share)
    auxiliary = sum(run.context.aux_losses) if run.context is not None and run.context.aux_losses else None
    total = language if auxiliary is None else language + auxiliary
    run.watch.at("backward")
    # A loss that is not finite may still have finite gradients: none of them may be.
    run.engine.backward(total * torch.where(total.detach().isfinite(), 1.0, float("nan")))
    of_balancers = language.new_zeros(()) if auxiliary is None else auxiliary
    return torch.stack([language.detach().double(), of_balancers.detach().double()])


def _global_counts(
    task: Supervised, micro_batches: list[Batch], error: str | None, device: torch.device
) -> tuple[int, int]:
    """(what the loss is a mean over, real tokens) of this step over all ranks: padding is not real, nor are samples
    that only fill up.

    Raises:
        UserError: on every rank, when any of them met a bad record.
    """
    labels = sum(task.weight(batch) for batch in micro_batches)
    tokens = sum((batch["attention_mask"] * batch["real"].unsqueeze(1)).sum() for batch in micro_batches)
    counts = torch.tensor([0, 0, int(error is not None)], device=device)
    counts[0] += labels
    counts[1] += tokens
    dist.all_reduce(counts)
    labelled, real, bad = counts.tolist()
    if bad:
        raise_together(error)
    return labelled, real


def _step_not_taken(run: Run, losses: Tensor) -> None:
    """Undo what a skipped step has begun, and write down its samples (collective)."""
    for balancing in run.balancings:
        balancing.counts_E.zero_()
    run.engine.lr_scheduler.step()  # the schedule is a function of the step; DeepSpeed holds it back with the weights
    by_rank = over_ranks(losses.sum().item())
    if run.topology.rank == 0:
        samples = run.stream.samples_of(run.step - run.file_from)
        ranks = [
            {"rank": rank, "loss": str(loss), "samples": own}
            for rank, (loss, own) in enumerate(zip(by_rank, samples, strict=True))
        ]
        with (run.folder / SKIPPED_STEPS).open("a") as file:
            file.write(json.dumps({"step": run.step + 1, "ranks": ranks}) + "\n")
    run.skipped += 1
    suspects = [rank for rank, loss in enumerate(by_rank) if not torch.tensor(loss).isfinite()]
    what = f"the loss of rank {', '.join(map(str, suspects))}" if suspects else "a gradient"
    run.monitor.note(
        f"step {run.step + 1} not taken: {what} is NaN or infinite (samples in {run.folder / SKIPPED_STEPS})"
    )


def check_skipped(run: Run) -> None:
    """Raises `UserError` on every rank after `train.max_skipped` steps in a row that were not taken."""
    count = run.skipped_in_a_row
    if count > run.config.train.max_skipped:
        raise UserError(
            f"steps {run.step - count + 1} to {run.step}: a NaN or infinite loss or gradient in each, more than "
            f"train.max_skipped {run.config.train.max_skipped} in a row; their samples are in "
            f"{run.folder / SKIPPED_STEPS}, the newest checkpoint is {run.result.get('checkpoint', 'none yet')}"
        )
