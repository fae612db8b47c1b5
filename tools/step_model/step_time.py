"""Seconds of one optimizer step, term by term, without and with overlap of ZeRO's communication; real runs lie between.

- no overlap: the sum of all terms.
- full overlap: in each pass of a micro-step ZeRO's collectives hide behind what is computed, or the other way round:
  max(computed, ZeRO) + all-to-all, which waits for rows and is waited for. The optimizer hides behind nothing.
"""

import math
from dataclasses import dataclass, replace

from ds_moe.config.zero_plan import ZeroPlan
from tools.step_model import shapes
from tools.step_model.costs import Topology, busiest_rows, check_topology, operations, roofline_s
from tools.step_model.links import all_reduce_s, all_to_all_s, dp_group, edp_group, ep_group, gather_s
from tools.step_model.machines import Machine
from tools.step_model.shapes import Decoder

COMPUTE, TRAFFIC, EXCHANGE, ZERO, OPTIMIZER = "FLOPs", "memory traffic", "all-to-all", "ZeRO", "optimizer"
REUSE_DISTANCE = ZeroPlan.reuse_distance  # DeepSpeed's default
SMALLEST_BUCKET = 2**24  # elements; ds_moe's "auto" buckets: max(this, D^2)
COUNT_BYTES, WEIGHT_BYTES = 8, 4  # what travels beside rows: int64 counts of experts, fp32 combine weights
LAYER_TENSORS = 5  # q, k, v, o and router, gathered one by one; smaller ones stay (stage3_param_persistence_threshold)


@dataclass(frozen=True)
class Term:
    """Seconds of one row of the table: three parts of a micro-step, and two of an optimizer step."""

    name: str
    bound: str  # what it waits for: COMPUTE, TRAFFIC, EXCHANGE, ZERO or OPTIMIZER
    forward_s: float = 0.0
    again_s: float = 0.0  # the forward that gradient checkpointing repeats
    backward_s: float = 0.0
    last_s: float = 0.0  # in the last micro-step's backward pass
    step_s: float = 0.0  # after the last backward pass

    def total_s(self, accumulation: int) -> float:
        return accumulation * (self.forward_s + self.again_s + self.backward_s) + self.last_s + self.step_s


@dataclass(frozen=True)
class Estimate:
    """An estimated optimizer step. `mfu` (no overlap) and `mfu_overlap` refer to the machine's peak."""

    terms: list[Term]
    step_s: float
    step_overlap_s: float
    tokens_per_s: float  # of all ranks, no overlap
    tokens_overlap_per_s: float
    mfu: float
    mfu_overlap: float

    def bounds(self, accumulation: int) -> dict[str, float]:
        """Seconds by what is waited for, without overlap, largest first."""
        sums: dict[str, float] = {}
        for term in self.terms:
            sums[term.bound] = sums.get(term.bound, 0) + term.total_s(accumulation)
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def estimate(topology: Topology, decoder: Decoder, machine: Machine) -> Estimate:
    check_topology(topology, decoder)
    terms = compute_terms(topology, decoder, machine)
    terms += exchange_terms(topology, decoder, machine)
    terms += zero_terms(topology, decoder, machine)
    owned = shapes.parameters(decoder) / topology.world  # elements whose optimizer state is this rank's
    # The gradient becomes fp32, the new weights become `dtype`.
    adam_s = owned * (machine.adam_bytes + 2 * topology.width + 4) / machine.memory_bandwidth
    terms.append(Term("optimizer", OPTIMIZER, step_s=adam_s))
    step_s = sum(term.total_s(topology.accumulation) for term in terms)
    overlap_s = overlapped_s(terms, topology.accumulation)
    tokens = topology.tokens * topology.accumulation
    # MFU counts 3 forwards (PaLM, appendix B), and nothing that is recomputed.
    ideal_s = 3 * shapes.forward_flops(decoder, tokens, topology.sequence) / machine.peak_flops[topology.dtype]
    all_tokens = tokens * topology.world
    speeds = (all_tokens / step_s, all_tokens / overlap_s)
    return Estimate(terms, step_s, overlap_s, *speeds, ideal_s / step_s, ideal_s / overlap_s)


def overlapped_s(terms: list[Term], accumulation: int) -> float:
    def part(field: str, *bounds: str) -> float:
        return sum(getattr(term, field) for term in terms if term.bound in bounds)

    work = COMPUTE, TRAFFIC
    forward = max(part("forward_s", *work), part("forward_s", ZERO)) + part("forward_s", EXCHANGE)
    work_s = part("again_s", *work) + part("backward_s", *work)
    zero_s, exchange_s = part("backward_s", ZERO), part("again_s", EXCHANGE) + part("backward_s", EXCHANGE)
    backward, last = (max(work_s, zero_s + more) + exchange_s for more in (0, part("last_s", ZERO)))
    return accumulation * forward + (accumulation - 1) * backward + last + sum(term.step_s for term in terms)


def compute_terms(topology: Topology, decoder: Decoder, machine: Machine) -> list[Term]:
    """One term for each name of an operation and what bounds it."""
    terms: dict[tuple[str, str], Term] = {}
    for operation in operations(topology, decoder):
        flops_s, traffic_s = roofline_s(operation, machine, topology.dtype)
        bound = COMPUTE if flops_s >= traffic_s else TRAFFIC
        before = terms.get((operation.name, bound), Term(operation.name, bound))
        once_s = operation.count * max(flops_s, traffic_s)
        again = operation.forward if topology.checkpointing and operation.repeated else 0
        terms[operation.name, bound] = replace(
            before,
            forward_s=before.forward_s + once_s * operation.forward,
            again_s=before.again_s + once_s * again,
            backward_s=before.backward_s + once_s * operation.backward,
        )
    return list(terms.values())


def exchange_terms(topology: Topology, decoder: Decoder, machine: Machine) -> list[Term]:
    """The EP all-to-all: counts once a layer (a repeated forward keeps its plan), rows there and back in every pass."""
    group, layers = ep_group(topology), decoder.moe_layers
    if group.size == 1:
        return []
    counts_s = layers * all_to_all_s(COUNT_BYTES * decoder.E, group, machine)
    row_bytes, rows = decoder.D * topology.width, busiest_rows(topology, decoder)
    there_s = all_to_all_s(rows * (row_bytes + WEIGHT_BYTES), group, machine, 2)  # weights on their own
    rows_s = layers * (there_s + all_to_all_s(rows * row_bytes, group, machine))
    again_s = rows_s if topology.checkpointing else 0
    return [
        Term("all-to-all of counts", EXCHANGE, counts_s),
        Term("all-to-all of rows", EXCHANGE, rows_s, again_s, rows_s),
    ]


def exchanged_bytes(topology: Topology, decoder: Decoder) -> float:
    """Bytes that one rank of even load hands to other ranks in the all-to-alls of a micro-step."""
    one_way = topology.tokens * decoder.K * (2 * decoder.D * topology.width + WEIGHT_BYTES)
    passes = 3 if topology.checkpointing else 2
    sent = COUNT_BYTES * decoder.E + passes * one_way
    return decoder.moe_layers * sent * (topology.ep_size - 1) / topology.ep_size


def layers_kept(topology: Topology, decoder: Decoder) -> int:
    """Layers that ZeRO-3 still holds when their backward pass comes.

    DeepSpeed keeps what is used again within `stage3_max_reuse_distance` elements of its trace: for layer i from the
    end both passes of the output layer and of the i layers behind it, and their repetition.
    """
    passes, layer = 3 if topology.checkpointing else 2, shapes.layer_parameters(decoder, decoder.E / topology.ep_size)
    room = REUSE_DISTANCE - 2 * decoder.vocabulary * decoder.D
    return 0 if room <= 0 else min(decoder.layers, math.ceil(room / (passes * layer)))


def zero_terms(topology: Topology, decoder: Decoder, machine: Machine) -> list[Term]:
    """Collectives of ZeRO: all but the experts over DP, a rank's own experts over EDP (one rank at ep_size == world).

    ZeRO-3 gathers weights in each pass and reduce-scatters gradients every micro-step. ZeRO-2 all-reduces gradients
    every micro-step (DeepSpeed's default use_multi_rank_bucket_allreduce), ZeRO-1 in the last one; both gather the
    updated weights.
    """
    width, layers = topology.width, decoder.layers
    other = shapes.other_parameters(decoder)
    experts = decoder.moe_layers * decoder.E / topology.ep_size * shapes.expert_parameters(decoder)
    bucket = max(SMALLEST_BUCKET, decoder.D**2)
    terms = []
    again = 1 - layers_kept(topology, decoder) / layers  # share that the backward pass gathers again
    parts = (
        ("others", other, dp_group(topology), LAYER_TENSORS * layers),
        ("experts", experts, edp_group(topology), 2 * decoder.moe_layers),
    )
    for part, elements, group, tensors in parts:
        if group.size == 1:
            continue
        size, buckets = elements * width, math.ceil(elements / bucket)
        if topology.zero_stage == 3:
            gather = gather_s(size, group, machine, tensors)
            scatter = gather_s(size, group, machine, buckets, "reduce_scatter")
            terms.append(Term(f"all-gather of {part}", ZERO, gather, backward_s=again * gather))
            terms.append(Term(f"reduce-scatter of {part}", ZERO, backward_s=scatter))
        else:
            reduce = all_reduce_s(size, group, machine, buckets)
            every, last = (reduce, 0.0) if topology.zero_stage == 2 else (0.0, reduce)
            terms.append(Term(f"all-reduce of {part}", ZERO, backward_s=every, last_s=last))
            terms.append(Term(f"all-gather of {part}", ZERO, step_s=gather_s(size, group, machine, buckets)))
    return terms
