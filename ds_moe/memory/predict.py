"""Peak memory of one rank, predicted from the configs alone: no weights, no accelerator.

A step has four moments at which it may need most: the loss is there and with it all activations; the backward pass
begins; it ends, and all gradients are there; the optimizer works. Each is summed by purpose, and the largest sum is the
prediction. A benchmark holds it against the peaks of runs on CPUs, within 15%.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from ds_moe.config.run import RunConfig
from ds_moe.config.zero_plan import ZeroPlan
from ds_moe.memory.activations import Activations, activations
from ds_moe.memory.parameter_counts import Shares, shares

GIB = 2**30
BUSY = 0.9  # share of the memory that a run may plan with; the rest goes to fragmentation
ADAM_BYTES = 12  # an element: fp32 master weight and two moments, which ZeRO keeps apart under fp32 too
RUNTIME_BYTES = {"cpu": GIB // 2, "accelerator": 3 * GIB // 2}  # libraries, context, communication buffers
READING_BYTES = 2**27  # of files at once, see models/streaming.py: pages that were touched, and a block
KEPT_FREE = "freed, kept by malloc"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by purpose, on the device that computes and on the host it is offloaded to.

    Attributes:
        moment: of a step, when the device needs most.
    """

    device: dict[str, int]
    host: dict[str, int]
    moment: str

    def table(self) -> list[str]:
        """Lines of purpose and GiB, with the totals."""
        rows = [("on the device", name, size) for name, size in self.device.items()]
        rows += [("on the host", name, size) for name, size in self.host.items()]
        rows.append((f"on the device, when {self.moment}", "total", sum(self.device.values())))
        return [f"{name:<22}{size / GIB:>9.3f} GiB  {where}" for where, name, size in rows if size]


@dataclass(frozen=True)
class LoadingMemory:
    """Bytes of one rank while the model is loaded, before the first step.

    Attributes:
        host: the rank's share and what is being read where weights are streamed from their files, else the complete
            model.
        device: what is moved there: the share; unstreamed, all but other ranks' experts, under ZeRO-3 too.
    """

    host: int
    device: int
    streamed: bool = False


def predict_loading(
    model: PreTrainedModel, config: RunConfig, zero: ZeroPlan, world_size: int, streams_weights: bool = True
) -> LoadingMemory:
    """Memory of one rank at the start; arguments as for `predict`."""
    width, ep_size = zero.width, config.moe.ep_size if config.moe else 1
    share = shares(model, ep_size, world_size)
    if not (streams_weights and config.model.path is not None):
        complete = sum(parameter.numel() for parameter in model.parameters())
        return LoadingMemory(width * complete, int(width * share.held))
    own = width * (share.owned if zero.stage == 3 else share.held)
    return LoadingMemory(int(own) + READING_BYTES, int(own), streamed=True)


def predict(
    model: PreTrainedModel,
    config: RunConfig,
    zero: ZeroPlan,
    world_size: int,
    on_cpu: bool,
    streams_weights: bool = True,
) -> Memory:
    """Memory of one rank.

    Args:
        model: an outline (`models/load.py`), unconverted, with the frozen parameters marked.
        config: the run.
        zero: of the run's DeepSpeed JSON.
        world_size: number of ranks, a multiple of `moe.ep_size`.
        on_cpu: whether the ranks train on CPUs, which have no context but hold everything in host memory.
        streams_weights: whether the run's task lets ranks read their shares from the files of `model.path`.
    """
    ep_size = config.moe.ep_size if config.moe else 1
    share, made = shares(model, ep_size, world_size), activations(model, config, zero.width, ep_size)
    states, host = _states(share, zero)
    moments = _moments(share, zero, made, config, world_size, on_cpu)
    moment, parts = max(moments.items(), key=lambda one: sum(one[1].values()))
    device = {**states, **parts}
    if on_cpu:
        streamed = streams_weights and config.model.path is not None
        loaded = 0.0 if streamed else zero.width * share.held  # which ZeRO has copied into its own buffers
        device[KEPT_FREE] = loaded + _kept_free(moments, parts)
    device["runtime"] = RUNTIME_BYTES["cpu" if on_cpu else "accelerator"]
    return Memory(*({name: int(size) for name, size in part.items()} for part in (device, host)), moment)


def _states(share: Shares, zero: ZeroPlan) -> tuple[dict[str, float], dict[str, float]]:
    """What is there all the time, on the device and on the host."""
    weights = zero.width * (share.owned if zero.stage == 3 else share.held)
    device: dict[str, float] = {"weights": weights, "optimizer": ADAM_BYTES * share.owned_trained}
    host: dict[str, float] = {}
    if zero.offload_optimizer:
        host["optimizer"] = device.pop("optimizer")
        host["gradients"] = zero.sum_width * share.owned_trained
        host["fp32 gradient of step"] = 4 * share.owned_trained
    if zero.offload_param:
        host["weights"] = device.pop("weights")
    return device, host


def _moments(
    share: Shares,
    zero: ZeroPlan,
    made: Activations,
    config: RunConfig,
    world_size: int,
    on_cpu: bool,
) -> dict[str, dict[str, float]]:
    """What comes on top of the states at each moment."""
    stage, width = zero.stage, zero.width
    accumulates = config.train.global_batch_size > config.train.micro_batch_size * world_size
    owned = 0.0 if zero.offload_optimizer else zero.sum_width * share.owned_trained
    unreduced = width * max(share.largest.trained, share.table_trained)
    buffer, copy = _buckets(share, zero, on_cpu)
    gathered = width * _gathered(share, zero, config.train.gradient_checkpointing) if stage == 3 else 0.0
    # What earlier micro-batches left: ZeRO-1 reduces in the last one, ZeRO-3's partition is there from the start.
    before = {1: accumulates * width * share.held_trained, 2: accumulates * owned, 3: owned}[stage]
    # ZeRO-1 copies its partition out of complete gradients; on a CPU the copy takes room as these are freed.
    copied = 0.0 if on_cpu else owned
    after = {1: width * share.held_trained + copied, 2: before + owned + unreduced, 3: owned + unreduced}[stage]
    work = {"layer at work": made.work, "all-to-all buffers": made.exchange}
    always = buffer if stage == 3 else 0.0
    return {
        "the loss is computed": {
            "gathered weights": gathered,
            "gradients": before,
            "gradient buckets": always,
            "activations": made.kept,
            "logits": made.logits,
        },
        "the backward pass begins": {
            "gathered weights": gathered,
            "gradients": before + unreduced,
            "gradient buckets": always if stage == 1 else buffer + copy,
            "activations": made.kept + made.repeated,
            **work,
        },
        "the backward pass ends": {
            "gathered weights": gathered,
            "gradients": after,
            "gradient buckets": buffer + copy,
            "activations": made.layer,
            **work,
        },
        "the optimizer steps": {
            "gradients": owned,
            "gradient buckets": always,
            "fp32 gradient of step": 0.0 if zero.offload_optimizer else _flat_gradient(share, zero),
        },
    }


def _kept_free(moments: dict[str, dict[str, float]], parts: dict[str, float]) -> float:
    """Bytes that CPU ranks do not return when they free them: `cpu_settings` tells glibc so, for speed.

    A hole that activations leave seldom fits a flat buffer of the optimizer, nor the reverse: every purpose ends up
    with room for its largest moment, instead of all sharing that of the peak. An estimate, as fragments are.
    """
    purposes = {name for moment in moments.values() for name in moment}
    return sum(max(moment.get(name, 0.0) for moment in moments.values()) for name in purposes) - sum(parts.values())


def _flat_gradient(share: Shares, zero: ZeroPlan) -> float:
    """Bytes of the gradient that Adam gets: of one optimizer group at once (ZeRO-3: of at most `sub_group_size`),
    flattened in the dtype that gradients are summed in, then in fp32."""
    elements = min(share.group, zero.sub_group) if zero.stage == 3 else share.group
    return elements * (4 + zero.sum_width if zero.sum_width < 4 else 4)


def _buckets(share: Shares, zero: ZeroPlan, on_cpu: bool) -> tuple[float, float]:
    """Bytes of the buffer that gradients are collected in, and of the copy that is reduced.

    On a CPU memory that was never written to takes no room, so the buffer is as large as what comes into it.
    """
    filled = min(zero.reduce_bucket, share.held_trained)
    return zero.width * (filled if on_cpu else zero.reduce_bucket), zero.width * filled


def _gathered(share: Shares, zero: ZeroPlan, repeats: bool) -> float:
    """Elements that ZeRO-3 holds complete at once: two layers (one is fetched while the other computes) or the largest
    table, and the layers it keeps for their backward pass.

    It keeps what is used again within `stage3_max_reuse_distance` elements of its trace: for layer i from the end that
    is both passes of the output layer and of the i layers behind it, and their repetition.
    """
    largest, passes = share.largest, 3 if repeats else 2
    room = zero.reuse_distance - 2 * share.table
    kept = max(0.0, room / (passes * largest.passed)) if largest.passed else 0.0
    wanted = kept * largest.gathered + max(2 * largest.gathered, share.table)
    return min(share.gathered, wanted, zero.max_live + share.table)
