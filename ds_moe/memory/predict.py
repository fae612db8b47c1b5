"""Peak memory of one rank, predicted from configs alone: it needs no weights and no accelerator.

Memory may be largest at five moments of a step: when all activations exist and the loss goes back through the output
layer; when the backward pass of the layers begins; when it ends and all gradients exist; when their norm is taken;
while the optimizer works. The prediction is the largest of their sums over purposes; a benchmark finds it within 15% of
the peaks of runs on CPUs.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from ds_moe.config.rules.engine import keeps_start
from ds_moe.config.run import RunConfig
from ds_moe.config.zero_plan import ZeroPlan
from ds_moe.memory.activations import NO_ACTIVATIONS, Activations, activations
from ds_moe.memory.parameter_counts import ParameterCounts, count_parameters
from ds_moe.models.families import family_of
from ds_moe.models.matrices import by_muon

GIB = 2**30
BUSY = 0.9  # share of the memory that a run may plan with; the rest is for fragmentation
ADAM_BYTES = 12  # per element: two moments and an fp32 master weight, which ZeRO makes of fp32 weights too
MUON_SAVES = 4  # of them: it has one moment
MUON_BUCKET = 2**26  # elements that the ranks of a group exchange at a time (`engine/flat_matrices.py`)
RUNTIME_BYTES = {"cpu": GIB // 2, "accelerator": 3 * GIB // 2}  # libraries, context, communication buffers
READING_BYTES = 2**27  # at most, while models/streaming.py reads: mapped pages of the files and a block of a tensor
KEPT_FREE = "freed, kept by malloc"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by purpose."""

    device: dict[str, int]  # on the device that computes
    host: dict[str, int]  # on the host, for what is offloaded to it
    moment: str  # of a step, at which the device needs most
    whole: bool = True  # False: without activations, whose size is not known of the model's family

    def table(self) -> list[str]:
        """Lines of purpose and GiB, with the totals."""
        rows = [("on the device", name, size) for name, size in self.device.items()]
        rows += [("on the host", name, size) for name, size in self.host.items()]
        rows.append((f"on the device, when {self.moment}", "total", sum(self.device.values())))
        return [f"{name:<22}{size / GIB:>9.3f} GiB  {where}" for where, name, size in rows if size]


@dataclass(frozen=True)
class LoadingMemory:
    """Bytes of one rank while the model is loaded, before the first step.

    Not streamed, the host holds the whole model and the device all but other ranks' experts, also under ZeRO-3, which
    shards weights only after they were moved to the device.
    """

    host: int  # if weights are streamed from their files, the rank's share and what is being read
    device: int  # if weights are streamed, the share
    streamed: bool = False


def predict_loading(
    model: PreTrainedModel, config: RunConfig, zero: ZeroPlan, world_size: int, streams_weights: bool = True
) -> LoadingMemory:
    """Memory of one rank at the start; arguments as for `predict`."""
    width, ep_size = zero.width, config.moe.ep_size if config.moe else 1
    counts = count_parameters(model, ep_size, world_size)
    if not (streams_weights and config.model.path is not None):
        complete = sum(parameter.numel() for parameter in model.parameters())
        return LoadingMemory(width * complete, int(width * counts.held))
    own = width * (counts.owned if zero.stage == 3 else counts.held)
    return LoadingMemory(int(own) + READING_BYTES, int(own), streamed=True)


def predict(
    model: PreTrainedModel,
    config: RunConfig,
    zero: ZeroPlan,
    world_size: int,
    on_cpu: bool,
    streams_weights: bool = True,
) -> Memory:
    """Memory of one rank of a model's outline (`models/load.py`), unconverted, with the frozen parameters marked.

    Args:
        world_size: number of ranks, a multiple of `moe.ep_size`.
        on_cpu: whether the ranks train on CPUs, where all memory is that of the host.
        streams_weights: whether ranks read their shares from the files of `model.path`, as in every run; tools may ask
            about ranks that load everything.
    """
    ep_size = config.moe.ep_size if config.moe else 1
    counts, whole = count_parameters(model, ep_size, world_size), family_of(model).measured
    made = activations(model, config, zero.width, ep_size, on_cpu) if whole else NO_ACTIVATIONS
    stacks = list(by_muon(model, config).values())
    muon = sum(stack.count * stack.rows * stack.columns for stack in stacks) / world_size
    states, host = _states(counts, zero, muon)
    host |= {"inputs of layers": made.moved} if made.moved else {}
    if keeps_start(config):
        (states if on_cpu else host)["starting policy"] = states.get("weights") or host["weights"]
    moments = _moments(counts, zero, made, config, world_size, on_cpu)
    if muon:
        block = max(stack.count * stack.rows * stack.columns for stack in stacks) / world_size
        moments["the optimizer steps"]["matrices at work"] = _orthogonalised(muon, block, zero, world_size)
    moment, parts = max(moments.items(), key=lambda one: sum(one[1].values()))
    device = {**states, **parts}
    if on_cpu:
        streamed = streams_weights and config.model.path is not None
        loaded = 0.0 if streamed else zero.width * counts.held  # freed when ZeRO has copied it into its own buffers
        device[KEPT_FREE] = loaded + _kept_free(moments, parts)
    device["runtime"] = RUNTIME_BYTES["cpu" if on_cpu else "accelerator"]
    return Memory(_whole_bytes(device), _whole_bytes(host), moment, whole)


def _whole_bytes(sizes: dict[str, float]) -> dict[str, int]:
    return {name: int(size) for name, size in sizes.items()}


def _states(counts: ParameterCounts, zero: ZeroPlan, muon: float) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that are in use all the time, on the device and on the host."""
    weights = zero.width * (counts.owned if zero.stage == 3 else counts.held)
    device: dict[str, float] = {"weights": weights, "optimizer": ADAM_BYTES * counts.owned_trained - MUON_SAVES * muon}
    host: dict[str, float] = {}
    if zero.offload_optimizer:
        host["optimizer"] = device.pop("optimizer")
        host["gradients"] = zero.sum_width * counts.owned_trained
        host["fp32 gradient of step"] = 4 * counts.owned_trained
    if zero.offload_param:
        host["weights"] = device.pop("weights")
    return device, host


def _moments(
    counts: ParameterCounts, zero: ZeroPlan, made: Activations, config: RunConfig, world_size: int, on_cpu: bool
) -> dict[str, dict[str, float]]:
    """Bytes that are in use on top of the states, by moment and purpose."""
    stage, width = zero.stage, zero.width
    # How many rows the samples of a step fill is known when they have been counted; several are planned for.
    accumulates = config.data.packing or config.train.global_batch_size > config.train.micro_batch_size * world_size
    owned = 0.0 if zero.offload_optimizer else zero.sum_width * counts.owned_trained
    unreduced = width * max(counts.largest.trained, counts.table_trained)
    buffer, copy = _buckets(counts, zero, on_cpu)
    gathered = width * _gathered(counts, zero, config.train.gradient_checkpointing) if stage == 3 else 0.0
    # Gradients accumulated by earlier micro-batches. ZeRO-1 keeps them whole until it reduces them in the last one;
    # ZeRO-2 keeps its partition of them, and so does ZeRO-3, which allocates it at the start.
    before = {1: accumulates * width * counts.held_trained, 2: accumulates * owned, 3: owned}[stage]
    # ZeRO-1 copies its partition out of the whole gradients. On a CPU the copy takes the place of those freed by then.
    copied = 0.0 if on_cpu else owned
    after = {1: width * counts.held_trained + copied, 2: before + owned + unreduced, 3: owned + unreduced}[stage]
    of_head = width * counts.table_trained
    work = {"layer at work": made.work, "all-to-all buffers": made.exchange}
    always = buffer if stage == 3 else 0.0
    return {
        "the loss goes back": {
            "gathered weights": gathered,
            "gradients": before + of_head,
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
        "the gradient norm is taken": {
            "gradients": owned,
            "gradient buckets": always,
            "fp64 copy of a gradient": 0.0 if zero.offload_optimizer else _norm_copy(counts, zero),
        },
        "the optimizer steps": {
            "gradients": owned,
            "gradient buckets": always,
            "fp32 gradient of step": 0.0 if zero.offload_optimizer else _flat_gradient(counts, zero),
        },
    }


def _kept_free(moments: dict[str, dict[str, float]], parts: dict[str, float]) -> float:
    """Bytes that CPU ranks do not return when they free them: `cpu_settings` tells glibc so, for speed.

    An estimate: a flat buffer of the optimizer seldom fits into a hole that activations left, nor the reverse, so every
    purpose ends up with the memory of its own largest moment, where otherwise all would share that of the peak.
    """
    purposes = {name for moment in moments.values() for name in moment}
    return sum(max(moment.get(name, 0.0) for moment in moments.values()) for name in purposes) - sum(parts.values())


def _flat_gradient(counts: ParameterCounts, zero: ZeroPlan) -> float:
    """Bytes of the flat gradient that Adam is given, in the dtype that gradients are summed in and again in fp32.

    It is that of one optimizer group at a time, and under ZeRO-3 of at most `sub_group_size` elements; none there where
    gradients are summed in fp32, which Adam then reads where they are (`engine/unshared.py`).
    """
    if zero.stage == 3 and zero.sum_width == 4:
        return 0.0
    elements = min(counts.group, zero.sub_group) if zero.stage == 3 else counts.group
    return elements * (4 + zero.sum_width if zero.sum_width < 4 else 4)


def _orthogonalised(muon: float, block: float, zero: ZeroPlan, world_size: int) -> float:
    """Bytes of what Muon works with: its share of a bucket as it is sent; of the `block` of matrices that it has at
    work, the largest parameter's share, the whole in fp32 and four tensors of Newton-Schulz in the precision of weights
    (`engine/muon.py`)."""
    share = MUON_BUCKET / world_size
    return 4 * min(muon, share) + (4 + 4 * zero.width) * min(block, share)


def _norm_copy(counts: ParameterCounts, zero: ZeroPlan) -> float:
    """Bytes of the copy in fp64 of which DeepSpeed takes a gradient's norm: of one parameter at a time, as far as it is
    in this rank's partition. Under ZeRO-3 the norm is taken without one (`engine/unshared.py`)."""
    return 0.0 if zero.stage == 3 else 8 * min(counts.whole, counts.group)


def _buckets(counts: ParameterCounts, zero: ZeroPlan, on_cpu: bool) -> tuple[float, float]:
    """Bytes of the buffers that gradients are collected in, and of the copy that is reduced.

    On a CPU, memory that was never written to takes no room, so only the part of the buffer that is filled counts.
    """
    filled = min(zero.reduce_bucket, counts.held_trained)
    buffers = 2 if zero.overlaps and zero.stage < 3 else 1
    return zero.width * buffers * (filled if on_cpu else zero.reduce_bucket), zero.width * filled


def _gathered(counts: ParameterCounts, zero: ZeroPlan, repeats: bool) -> float:
    """Elements that ZeRO-3 holds gathered at once.

    These are two layers, one of which is fetched while the other computes, or else the largest table; and the layers
    that it keeps for their backward pass. ZeRO-3 keeps what is used again within `stage3_max_reuse_distance` elements
    of its trace. Between the two uses of the i-th layer from the end lie both passes of the output layer and of the i
    layers behind it, and with gradient checkpointing their repeated forward pass.
    """
    largest, passes = counts.largest, 3 if repeats else 2
    room = zero.reuse_distance - 2 * counts.table
    kept = max(0.0, room / (passes * largest.passed)) if largest.passed else 0.0
    wanted = kept * largest.gathered + max(2 * largest.gathered, counts.table)
    return min(counts.gathered, wanted, zero.max_live + counts.table)
