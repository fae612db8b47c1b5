"""What one rank computes in a micro-step, as operations of counted FLOPs and bytes, each on a roofline.

An operation takes max(FLOPs / rate, bytes / bandwidth) (Williams et al. 2009): an expert with few rows costs the
reading of its weights. The backward pass of a matrix product is two products of the same size. Elementwise work
is counted as transformers' modules do it, one kernel after another, nothing fused. Launches and Python are not counted.
"""

from dataclasses import dataclass
from typing import Any, Literal

from ds_moe.errors import UserError
from tools.step_model.machines import Machine
from tools.step_model.shapes import Decoder, other_parameters, parameters, score_flops

Kind = Literal["dense", "grouped", "attention", "elementwise"]
WIDTHS = {"bf16": 2, "fp32": 4}
FLASH_BACKWARD = 2.5  # FlashAttention: 5 products against the forward's 2
LOSS_BYTES = 28  # a logit, forward and backward: to fp32, log-softmax, gradient; besides 2 accesses in its own width


@dataclass(frozen=True)
class Topology:
    """How a model is trained: N ranks of which `ep_size` share one copy of the experts."""

    nodes: int
    devices_per_node: int
    ep_size: int = 1
    zero_stage: int = 3
    tokens: int = 4096  # a rank and micro-step
    sequence: int = 4096  # tokens of one sequence, at most `tokens`
    accumulation: int = 1  # micro-steps of an optimizer step
    dtype: str = "bf16"
    checkpointing: bool = False
    max_vio: float = 0.0  # rows of the busiest rank above its fair share, as a share of it; no effect at ep_size 1

    @property
    def world(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def width(self) -> int:
        """Bytes of a weight or an activation."""
        return WIDTHS[self.dtype]


def check_topology(topology: Topology, decoder: Decoder) -> None:
    for option in ("nodes", "devices_per_node", "ep_size", "tokens", "sequence", "accumulation"):
        if getattr(topology, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} {getattr(topology, option)}: must be at least 1")
    if decoder.E % topology.ep_size:
        raise UserError(f"--ep-size {topology.ep_size} does not divide the {decoder.E} experts of {decoder.name}")
    if topology.world % topology.ep_size:
        raise UserError(f"--ep-size {topology.ep_size} does not divide the {topology.world} ranks")
    if topology.dtype not in WIDTHS:
        raise UserError(f"--dtype {topology.dtype}: one of {', '.join(WIDTHS)}")
    if topology.sequence > topology.tokens:
        raise UserError(f"--sequence {topology.sequence} exceeds the {topology.tokens} --tokens of a micro-step")
    if topology.max_vio < 0:
        raise UserError(f"--max-vio {topology.max_vio}: must be at least 0")


def busiest_rows(topology: Topology, decoder: Decoder) -> float:
    """Rows that the experts of the busiest rank get: T K (1 + MaxVio), at most all of its EP group's."""
    mean = topology.tokens * decoder.K
    return mean * min(1 + topology.max_vio, topology.ep_size) if topology.ep_size > 1 else mean


def held_parameters(topology: Topology, decoder: Decoder) -> float:
    """Elements of a complete copy of this rank's share: all but other ranks' experts."""
    other = other_parameters(decoder)
    return other + (parameters(decoder) - other) / topology.ep_size


@dataclass(frozen=True)
class Operation:
    """Work of one rank in one micro-step, all layers together."""

    name: str  # the table's row it belongs to
    kind: Kind
    flops: float  # of one execution in one layer
    bytes: float
    count: int = 1  # executions of a forward (layers)
    forward: float = 1  # times it is executed in this pass
    backward: float = 2
    repeated: bool = True  # whether gradient checkpointing executes its forward again


def gemm(
    name: str, kind: Kind, rows: float, inner: int, outer: int, width: int, count: int, weights: float = 1, **more: Any
) -> Operation:
    """(rows, inner) x (inner, outer), split over `weights` matrices: reads rows and every matrix, writes rows."""
    moved = width * (rows * (inner + outer) + weights * inner * outer)
    return Operation(name, kind, 2 * rows * inner * outer, moved, count, **more)


def operations(topology: Topology, decoder: Decoder) -> list[Operation]:
    """Everything one rank computes in a micro-step but the optimizer; the busiest rank's where ranks differ."""
    T, D, C, width = topology.tokens, decoder.D, decoder.head_dim, topology.width
    heads, layers, moe = decoder.heads, decoder.layers, decoder.moe_layers
    both_heads = heads + decoder.kv_heads
    rows = busiest_rows(topology, decoder)
    local = min(decoder.E / topology.ep_size, rows)  # experts that have a row to multiply
    norm = 20 + 2 * width + (0 if width == 4 else 2 * (width + 4))  # bytes an element: x^2, mean, scale in fp32; weight
    rotary = 10 * width  # rotate_half, two products, a sum
    swiglu = 3 * width + 36 + (12 if width < 4 else 0)  # silu, two products, a copy in fp32, and casts
    residual = 2 * 3 * width * D  # two sums
    normed = T * (2 * D * norm + both_heads * C * (norm + rotary) + residual)
    # Each row copied, read again, the sums written; under EP also sorted twice by rank and expert.
    dispatched = D * width * (T * (decoder.K * 3 + 1) + (4 * rows if topology.ep_size > 1 else 0))
    attention_bytes = width * T * C * 2 * both_heads  # reads q, k, v, writes the output: nothing of size S x S
    scores = score_flops(decoder, T, topology.sequence)
    bucketed = 4 * width * held_parameters(topology, decoder)  # into a bucket and out of it, every micro-step
    work = [
        gemm("attention projections", "dense", T, D, C * (heads + 2 * decoder.kv_heads), width, layers),
        gemm("attention projections", "dense", T, C * heads, D, width, layers),
        Operation("attention scores", "attention", scores, attention_bytes, layers, backward=FLASH_BACKWARD),
        Operation("norms, rotary, residuals", "elementwise", 0, normed, layers),
        gemm("router", "dense", T, D, decoder.E, width, moe),
        Operation("router", "elementwise", 0, 6 * 4 * T * decoder.E, moe),  # softmax, top-k, counts in fp32
        gemm("experts", "grouped", rows, D, 2 * decoder.F, width, moe, local),
        gemm("experts", "grouped", rows, decoder.F, D, width, moe, local),
        Operation("experts' activation", "elementwise", 0, rows * decoder.F * swiglu, moe),
        Operation("dispatch and combine", "elementwise", 0, dispatched, moe, backward=1),
        *head_operations(topology, decoder),
        Operation("gradient buckets", "elementwise", 0, bucketed, forward=0, backward=1),
    ]
    if decoder.dense_layers:
        F = decoder.dense_F
        work += [
            gemm("dense MLP", "dense", T, D, 2 * F, width, decoder.dense_layers),
            gemm("dense MLP", "dense", T, F, D, width, decoder.dense_layers),
            Operation("dense MLP", "elementwise", 0, T * F * 5 * width, decoder.dense_layers),
        ]
    return work


def head_operations(topology: Topology, decoder: Decoder) -> list[Operation]:
    """Embedding, output layer and loss; outside the layers, so that checkpointing repeats none of them."""
    T, D, V, width = topology.tokens, decoder.D, decoder.vocabulary, topology.width
    once = {"repeated": False}
    return [
        gemm("lm_head", "dense", T, D, V, width, 1, **once),
        Operation("loss", "elementwise", 0, T * V * (LOSS_BYTES + 2 * width) / 2, backward=1, **once),
        Operation("embedding", "elementwise", 0, 2 * T * D * width, backward=0, **once),
        Operation("embedding", "elementwise", 0, width * D * (2 * T + V), forward=0, backward=1, **once),
    ]


def roofline_s(operation: Operation, machine: Machine, dtype: str) -> tuple[float, float]:
    """Seconds that one execution's FLOPs and its bytes take; it takes the longer of the two."""
    if dtype not in machine.peak_flops:
        raise UserError(f"--dtype {dtype}: {machine.name} has figures for {', '.join(machine.peak_flops)} only")
    reached = 1.0 if operation.kind == "elementwise" else getattr(machine, operation.kind)
    return operation.flops / (machine.peak_flops[dtype] * reached), operation.bytes / machine.memory_bandwidth
