"""Rules of a run file about `task: gate`; `check.py` takes them into its tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_moe.config.rules.rule import Complaint
from ds_moe.config.run import RunConfig, other_task, task_is

Unused = Callable[[RunConfig], str | None]


def _no_gate(config: RunConfig) -> str | None:
    other = other_task(config, "gate")
    return None if other is None else f"task is {other}"


def _gate_is(key: str, *values: Any) -> Unused:
    def rule(config: RunConfig) -> str | None:
        value = getattr(config.gate, key)
        return None if not task_is(config, "gate") or value in values else f"gate.{key} is {value}"

    return rule


def no_answers(config: RunConfig) -> str | None:
    supervised = task_is(config, "gate") and config.gate.stage == "supervised"
    return "gate.stage supervised learns which adapter, and answers nothing" if supervised else None


def _no_text(config: RunConfig) -> str | None:
    return "gate.modalities is vision" if task_is(config, "gate") and config.gate.modalities == "vision" else None


GATE_UNUSED: dict[str, Unused] = {
    "gate": _no_gate,
    "gate.text": _no_text,
    "gate.text_layer": lambda config: _no_text(config) or _gate_is("text", "layer")(config),
    "gate.vision": lambda config: "gate.modalities is text" if config.gate.modalities == "text" else None,
    "gate.top_k": _gate_is("select", "top_k"),
    "gate.temperature": lambda config: (
        "gate.select top_k with gate.top_k 1 has weights of 1 at any temperature"
        if (config.gate.select, config.gate.top_k) == ("top_k", 1)
        else None
    ),
    "gate.class_weights": _gate_is("stage", "supervised"),
    "gate.entropy_weight": _gate_is("stage", "end_to_end", "joint"),
    "gate.kl_weight": _gate_is("stage", "end_to_end", "joint"),
    "gate.adapter_lr": _gate_is("stage", "joint"),
}


def _adapters(config: RunConfig) -> Complaint:
    none = task_is(config, "gate") and not config.gate.adapters and config.gate.adapters_in is None
    text = "neither gate.adapters nor gate.adapters_in is set; name the adapters, or their folder"
    return "gate", text if none else None


def _labelled_data(config: RunConfig) -> Complaint:
    for key in ("train", "eval"):
        if task_is(config, "gate") and getattr(config.data, key) == "digits":
            return f"data.{key}", f'data.{key} is "digits", whose records name no adapter; give a JSONL file'
    return "data.train", None


def _alone(config: RunConfig) -> Complaint:
    if task_is(config, "gate"):
        for key, what in (("moe", "gates adapters of a dense model"), ("lora", "brings the adapters itself")):
            if getattr(config, key) is not None:
                return key, f"section {key} would not be used: task gate {what}; remove it"
        if config.model.freeze:
            return "model.freeze", "model.freeze would not be used: task gate freezes the whole model; remove it"
    return "gate", None


def _reference(config: RunConfig) -> Complaint:
    wrong = task_is(config, "gate") and config.gate.kl_weight and config.gate.start is None
    text = "gate.kl_weight holds the gate near that of gate.start, which is not set; name the supervised run"
    return "gate.kl_weight", text if wrong else None


def _top_k(config: RunConfig) -> Complaint:
    missing = task_is(config, "gate") and config.gate.select == "top_k" and config.gate.top_k is None
    return "gate.select", "gate.select top_k needs gate.top_k; set it" if missing else None


def _text_layer(config: RunConfig) -> Complaint:
    missing = task_is(config, "gate") and config.gate.text == "layer" and config.gate.text_layer is None
    return "gate.text", "gate.text layer needs gate.text_layer; set it" if missing else None


def _one_constant(config: RunConfig) -> Complaint:
    """A top-1 gate's weight is the constant 1: the model's loss teaches it nothing."""
    gate = config.gate
    wrong = task_is(config, "gate") and gate.stage != "supervised" and (gate.select, gate.top_k) == ("top_k", 1)
    text = f"gate.select top_k with gate.top_k 1 learns nothing from the answers of stage {gate.stage}; use hard"
    return "gate.select", text if wrong else None


def _per_token_text(config: RunConfig) -> Complaint:
    wrong = task_is(config, "gate") and config.gate.per == "token" and config.gate.text != "embeddings"
    text = f"gate.per token reads each token's own embedding; gate.text {config.gate.text} would not be used"
    return "gate.text", text if wrong else None


GATE_CONTRADICTIONS: list[Callable[[RunConfig], Complaint]] = [
    _adapters,
    _labelled_data,
    _alone,
    _reference,
    _top_k,
    _text_layer,
    _one_constant,
    _per_token_text,
]
