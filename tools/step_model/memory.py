"""Estimated peak memory of one rank in bytes, by purpose: states counted exactly, activations by what autograd keeps.

States, attention and norms are counted as in `ds_moe/memory/predict.py`, which the doctor uses; experts as the function
of `ds_moe/moe/backends/swiglu.py` that keeps rows (D) and gate_up (2F) of each assignment (`recompute: act`).
"""

from __future__ import annotations

from tools.step_model.costs import Topology, busiest_rows, gathered_layer, held_parameters, owned_parameters
from tools.step_model.shapes import Decoder
from tools.step_model.step_time import SMALLEST_BUCKET, layers_kept

GIB = 2**30
ADAM_BYTES = 12  # an element: fp32 master weight and two moments
SUB_GROUP = 1e9  # elements that the optimizer takes at once
HEADROOM = 0.95  # of a device's memory: the rest is lost to fragments


def memory(topology: Topology, decoder: Decoder, runtime: float) -> dict[str, float]:
    """Bytes by purpose, their sum the peak; `runtime` as in `Machine`."""
    width, stage = topology.width, topology.zero_stage
    held, owned = held_parameters(topology, decoder), owned_parameters(topology, decoder)
    layer = gathered_layer(topology, decoder)
    unreduced = min(held, owned + layer)  # partitions, and the layer whose gradients are not yet reduced
    buckets = 2 * max(SMALLEST_BUCKET, decoder.D**2)
    return {
        "weights": width * (owned if stage == 3 else held),
        "gathered weights": width * _gathered(topology, decoder) if stage == 3 else 0.0,
        "gradients": width * (held if stage == 1 else unreduced),
        "optimizer": ADAM_BYTES * owned,
        "fp32 gradient of step": 4 * min(owned, SUB_GROUP),
        "buckets": width * min(buckets, 2 * held),
        **_activations(topology, decoder),
        "runtime": runtime,
    }


def fits(parts: dict[str, float], device_bytes: float) -> bool:
    return sum(parts.values()) <= HEADROOM * device_bytes


def _gathered(topology: Topology, decoder: Decoder) -> float:
    """Elements complete at once: layers kept for their backward pass, and two layers or the output layer."""
    layer = gathered_layer(topology, decoder)
    largest = max(2 * layer, decoder.vocabulary * decoder.D)
    return min(held_parameters(topology, decoder), layers_kept(topology, decoder) * layer + largest)


def saved_bytes(topology: Topology, decoder: Decoder) -> float:
    """What one MoE layer keeps for its backward pass; of an assignment: rows D, gate_up 2F and its fp32 weight."""
    T, D, C, rows = topology.tokens, decoder.D, decoder.head_dim, busiest_rows(topology, decoder)
    attention = 3 * C * (decoder.heads + 2 * decoder.kv_heads)  # projected, normalised, rotated
    norms = 14 * D  # two RMSNorms that compute in fp32, and the residual stream
    router = 3 * 4 * T * decoder.E  # logits, scores and the gradient's mask in fp32
    experts = topology.width * rows * (D + 2 * decoder.F) + 4 * rows
    return topology.width * T * (attention + norms) + experts + router


def _activations(topology: Topology, decoder: Decoder) -> dict[str, float]:
    T, D, width, rows = topology.tokens, decoder.D, topology.width, busiest_rows(topology, decoder)
    layer = saved_bytes(topology, decoder)
    boundary = width * T * D
    exchange = width * D * (T * decoder.K + rows) if topology.ep_size > 1 else 0  # sent and received, one layer's
    return {
        "activations": decoder.layers * boundary + layer if topology.checkpointing else decoder.layers * layer,
        "all-to-all buffers": exchange,
        # One layer's gradients of gate_up, activation and rows.
        "experts' workspace": width * rows * (D + 3 * decoder.F),
        "logits": T * decoder.vocabulary * (width + 8),  # and an fp32 copy with its gradient
    }
