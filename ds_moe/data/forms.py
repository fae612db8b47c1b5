"""Which records a run reads, by its task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ds_moe.config import RunConfig
from ds_moe.data.form import CHAT, Form
from ds_moe.data.rollouts import rollout_form
from ds_moe.data.routed import gate_form
from ds_moe.replay.align import RoutingShape


def train_form(config: RunConfig, model_config: Any) -> Form:
    """What the records of data.train are in this run.

    Args:
        model_config: transformers' config of the model.
    """
    if config.task != "rl":
        return eval_form(config)
    shape = None
    if config.moe is not None and config.moe.replay.enabled:
        shape = RoutingShape.of(model_config)
        shape = replace(shape, top_k=config.moe.router.top_k or shape.top_k)
    return rollout_form(shape, config.rl.normalize_std, need_reference=config.rl.kl_weight > 0)


def eval_form(config: RunConfig) -> Form:
    """What the records of data.eval are: conversations, with the adapter that should answer where a gate is trained."""
    if config.task != "gate":
        return CHAT
    from ds_moe.gating.adapters import find_adapters  # seconds of imports that other tasks do not need

    names = list(find_adapters(config.gate.adapters, config.gate.adapters_in))
    return gate_form(names, labelled=config.gate.stage == "supervised")
