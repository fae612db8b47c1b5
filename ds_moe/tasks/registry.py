"""What each `task` of a run file means: its records, what it trains, its loss and its reports."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from ds_moe.config.run import RunConfig
from ds_moe.data.record_kind import CHAT, Form
from ds_moe.data.stream import TrainStream
from ds_moe.models.freeze import freeze, frozen
from ds_moe.models.lora import add_lora
from ds_moe.replay.align import RoutingShape
from ds_moe.tasks.gate.model import install_gate
from ds_moe.tasks.gate.records import gate_form
from ds_moe.tasks.gate.task import GateTask
from ds_moe.tasks.rl.rollouts import rollout_form
from ds_moe.tasks.rl.task import PolicyOptimization
from ds_moe.tasks.task import Supervised


def set_trainable(model: PreTrainedModel, config: RunConfig) -> None:
    """Freeze what a run does not train of an unconverted model, and add what it trains instead."""
    if config.task == "gate":
        install_gate(model, config.gate)
    elif config.lora is not None:
        add_lora(model, config.lora, config.train.seed)
    else:
        freeze(model, frozen(config))


def keeps_base_apart(config: RunConfig) -> bool:
    """Whether this run's checkpoints leave out the frozen model."""
    return config.lora is not None or config.task == "gate"


def _task(config: RunConfig, model: Any, stream: TrainStream) -> Supervised:
    if config.task == "rl":
        return PolicyOptimization(config.rl, config.moe is not None and config.moe.replay.enabled, model)
    if config.task == "gate":
        return GateTask(config.gate, model, stream.kept)
    return Supervised()


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
    from ds_moe.tasks.gate.adapters import find_adapters  # seconds of imports that other tasks do not need

    names = list(find_adapters(config.gate.adapters, config.gate.adapters_in))
    return gate_form(names, labelled=config.gate.stage == "supervised")
