"""Checks of what a rank needs: frozen parts, memory at the peak, memory at the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ds_moe.config.divisors import fitting_ep_sizes
from ds_moe.config.run import RunConfig
from ds_moe.config.run_file import ALL_KEYS
from ds_moe.config.zero_plan import ZeroPlan
from ds_moe.doctor.case import GIB, Case, Finding
from ds_moe.errors import UserError

if TYPE_CHECKING:
    from ds_moe.memory.predict import LoadingMemory, Memory

RANKS_A_HOST = 8  # accelerators that a host of a job may have; the doctor is not told how many


def check_outline(case: Case) -> Iterator[Finding]:
    """Frozen parts and predicted memory, on the model without storage."""
    from ds_moe.memory.predict import predict, predict_loading
    from ds_moe.models.freeze import trained_experts
    from ds_moe.models.load import build_outline
    from ds_moe.tasks.registry import task_kind

    if case.model is None:
        return
    config, model, kind = case.config, build_outline(case.model), task_kind(case.config)
    try:
        kind.set_trainable(model, config)
    except UserError as error:
        named = str(error).partition(" ")[0]
        key = named if named in ALL_KEYS else kind.trainable_key(config)
        yield Finding("error", f"{config.at(key)}: {error}")
        return
    case.outline = model
    longest = case.model.get_text_config().max_position_embeddings
    if config.data.max_length > longest:
        text = f"data.max_length {config.data.max_length} exceeds the {longest} positions the model was made for"
        yield Finding("warning", f"{config.at('data.max_length')}: {text}")
    zero, on_cpu = case.zero, case.device.on_cpu
    if zero is None:
        return
    if zero.stage < 3 and case.experts and not trained_experts(model):
        key = kind.freezing_key(config)
        what = key if key != "task" else f"task {kind.name}"
        text = f"{what} freezes all experts, which DeepSpeed cannot do at ZeRO stage {zero.stage}; use stage 3"
        yield Finding("error", f"{config.at(key)}: {text}")
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    yield Finding("ok", f"model: {case.model.model_type}, {parameters:,} parameters, {trained:,} of them trained")
    yield _memory(case, zero, lambda other: predict(model, other, zero, case.world_size, on_cpu))
    yield from _loading(case, zero, predict_loading(model, config, zero, case.world_size))


def _memory(case: Case, zero: ZeroPlan, predicted: Callable[[RunConfig], Memory]) -> Finding:
    """Whether the run fits, and how long its packed rows may be."""
    from ds_moe.memory.predict import BUSY
    from ds_moe.memory.rows import largest_row

    def needed(memory: Memory) -> int:
        return sum(memory.device.values()) + (sum(memory.host.values()) if case.device.on_cpu else 0)

    config, limit = case.config, BUSY * case.device.memory
    memory = predicted(config)
    row = largest_row(config, lambda other: needed(predicted(other)) <= limit) if config.data.packing else None
    there = f"{case.device.memory / GIB:.1f} GiB are there ({case.device.source})"
    text = f"memory: about {needed(memory) / GIB:.1f} GiB a rank; {there}"
    if not memory.whole and case.model is not None:
        unknown = f"and activations, which are not predicted of {case.model.model_type} models"
        text = f"memory: {needed(memory) / GIB:.1f} GiB a rank {unknown}; {there}"
    if needed(memory) > limit:
        key = "train.tokens_per_micro_batch" if config.data.packing else "train.micro_batch_size"
        return Finding("error", f"{config.at(key)}: {text}; {_relief(case, zero, row)}", memory.table())
    longest = f"; rows of up to {row} tokens fit (train.tokens_per_micro_batch)" if row else ""
    return Finding("ok" if memory.whole else "warning", text + longest, memory.table())


def _loading(case: Case, zero: ZeroPlan, load: LoadingMemory) -> Iterator[Finding]:
    """Memory before the first step, which may exceed that of the training where nothing is sharded yet."""
    import psutil  # DeepSpeed depends on it

    from ds_moe.memory.predict import BUSY

    where, on_cpu = case.config.at("model"), case.device.on_cpu
    moved_whole = zero.stage == 3 and not load.streamed  # at 1 and 2 the peak counts it
    if moved_whole and not on_cpu and load.device > BUSY * case.device.memory:
        text = f"a rank's {load.device / GIB:.1f} GiB of weights are moved to the device before ZeRO-3 shards them"
        there = f"{case.device.memory / GIB:.1f} GiB are there ({case.device.source})"
        larger = [size for size in fitting_ep_sizes(case.world_size, case.experts) if size > _ep_size(case)]
        named = f"raise moe.ep_size (to {' or '.join(map(str, larger))}), or " if case.config.moe and larger else ""
        fix = f"{named}take larger devices"
        yield Finding("error", f"{where}: start: {text}; {there}; {fix}")
    ranks = case.world_size if on_cpu else min(case.world_size, RANKS_A_HOST)
    needed, free = ranks * load.host, psutil.virtual_memory().available
    what = "reads its share of the weights into" if load.streamed else "holds the whole model in"
    text = (
        f"start: every rank {what} host memory, {load.host / GIB:.1f} GiB x {ranks} ranks of a host "
        f"= {needed / GIB:.1f} GiB; {free / GIB:.1f} GiB are free on this machine"
    )
    if needed > BUSY * free:
        yield Finding("warning", f"{where}: {text}; see that the hosts of the job have them")
    else:
        yield Finding("ok", text)


def _ep_size(case: Case) -> int:
    return case.config.moe.ep_size if case.config.moe else 1


def _relief(case: Case, zero: ZeroPlan, row: int | None) -> str:
    """The knobs of this run that would make it smaller, the cheapest first; `row`: the longest packed row that fits."""
    config, on_gpus = case.config, not case.device.on_cpu
    knobs = []
    if not config.train.gradient_checkpointing:
        knobs.append("train.gradient_checkpointing true")
    elif on_gpus and not config.train.offload_activations:
        knobs.append("train.offload_activations true")
    if row:
        knobs.append(f"train.tokens_per_micro_batch {row}, the most that fits")
    elif config.train.micro_batch_size > 1 and not config.data.packing:
        knobs.append("a smaller train.micro_batch_size")
    if zero.stage < 3:
        knobs.append("deepspeed: zero3")
    elif not zero.offload_optimizer and on_gpus:
        knobs.append("deepspeed: zero3_offload")
    return "try " + ", ".join([*knobs, "a smaller data.max_length", "more ranks"])
