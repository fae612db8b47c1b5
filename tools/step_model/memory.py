"""Peak memory of one rank in bytes, by purpose: what `ds_moe.memory` predicts, as the doctor does."""

from __future__ import annotations

import functools

from transformers import PreTrainedModel, Qwen3MoeConfig

from ds_moe.config.deepspeed import resolve_deepspeed, zero_plan
from ds_moe.doctor.plans import Plan, run_of
from ds_moe.memory.predict import BUSY, predict
from ds_moe.models.load import build_outline
from tools.step_model.costs import Topology
from tools.step_model.machines import Machine
from tools.step_model.shapes import Decoder


def memory(topology: Topology, decoder: Decoder, machine: Machine) -> dict[str, float]:
    """Bytes by purpose at the moment of a step that needs most, their sum the peak; rows are routed evenly.

    Args:
        topology: one that `check_topology` has nothing against.
    """
    model, on_cpu = outline(decoder), machine.name == "cpu"
    settings = {
        # What a micro-step keeps depends on its tokens, not on how they are cut into sequences.
        "data.max_length": topology.tokens,
        "train.gradient_checkpointing": topology.checkpointing,
        "train.precision": topology.dtype,
    }
    plan = Plan(topology.world, topology.ep_size, topology.zero_stage)
    run = run_of(plan, decoder.name, model.config, settings)
    run.train.global_batch_size *= topology.accumulation
    ds = resolve_deepspeed(run, topology.world, on_cpu, decoder.D)
    found = predict(model, run, zero_plan(ds), topology.world, on_cpu, streams_weights=False)
    return {**found.device, "runtime": machine.runtime}


def fits(parts: dict[str, float], device_bytes: float) -> bool:
    return sum(parts.values()) <= BUSY * device_bytes


@functools.cache
def outline(decoder: Decoder) -> PreTrainedModel:
    """The decoder in transformers, without storage."""
    return build_outline(
        Qwen3MoeConfig(
            hidden_size=decoder.D,
            num_hidden_layers=decoder.layers,
            num_attention_heads=decoder.heads,
            num_key_value_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            moe_intermediate_size=decoder.F,
            num_experts=decoder.E,
            num_experts_per_tok=decoder.K,
            vocab_size=decoder.vocabulary,
            mlp_only_layers=list(range(decoder.dense_layers)),
            intermediate_size=decoder.dense_F,
            tie_word_embeddings=decoder.tied,
        )
    )
