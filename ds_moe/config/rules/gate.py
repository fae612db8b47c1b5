"""Rules about `task: gate` and its section `gate`."""

from ds_moe.config.rules.rule import Complaint, Contradiction, Unused, in_task, needs
from ds_moe.config.run import RunConfig, other_task, task_is

# --- keys without effect


def no_answers(config: RunConfig) -> str | None:
    """Why evaluation generates no answers, where that is because of the gate's stage."""
    supervised = task_is(config, "gate") and config.gate.stage == "supervised"
    return "gate.stage supervised learns which adapter, and answers nothing" if supervised else None


def _no_gate(config: RunConfig) -> str | None:
    other = other_task(config, "gate")
    return f"task is {other}" if other else None


def _no_text(config: RunConfig) -> str | None:
    return "gate.modalities is vision" if config.gate.modalities == "vision" else None


def _no_vision(config: RunConfig) -> str | None:
    return "gate.modalities is text" if config.gate.modalities == "text" else None


def _no_temperature(config: RunConfig) -> str | None:
    reason = "gate.select top_k with gate.top_k 1 has weights of 1 at any temperature"
    return reason if (config.gate.select, config.gate.top_k) == ("top_k", 1) else None


UNUSED: dict[str, Unused] = {
    "gate": _no_gate,
    "gate.text": in_task("gate", _no_text),
    "gate.text_layer": in_task("gate", lambda config: _no_text(config) or needs("gate.text", "layer")(config)),
    "gate.vision": _no_vision,
    "gate.top_k": in_task("gate", needs("gate.select", "top_k")),
    "gate.temperature": _no_temperature,
    "gate.class_weights": in_task("gate", needs("gate.stage", "supervised")),
    "gate.entropy_weight": in_task("gate", needs("gate.stage", "end_to_end", "joint")),
    "gate.kl_weight": in_task("gate", needs("gate.stage", "end_to_end", "joint")),
    "gate.adapter_lr": in_task("gate", needs("gate.stage", "joint")),
}


# --- contradictions, in runs with task gate


def _adapters(config: RunConfig) -> Complaint | None:
    if config.gate.adapters or config.gate.adapters_in is not None:
        return None
    return "gate", "neither gate.adapters nor gate.adapters_in is set; name the adapters, or their folder"


def _labelled_data(config: RunConfig) -> Complaint | None:
    for key, path in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if path == "digits":
            return key, f'{key} is "digits", whose records name no adapter; give a JSONL file'
    return None


def _alone(config: RunConfig) -> Complaint | None:
    if config.moe is not None:
        return "moe", "section moe would not be used: task gate gates adapters of a dense model; remove it"
    if config.lora is not None:
        return "lora", "section lora would not be used: task gate brings the adapters itself; remove it"
    if config.model.freeze:
        return "model.freeze", "model.freeze would not be used: task gate freezes the whole model; remove it"
    return None


def _reference(config: RunConfig) -> Complaint | None:
    if not config.gate.kl_weight or config.gate.start is not None:
        return None
    text = "gate.kl_weight holds the gate near that of gate.start, which is not set; name the supervised run"
    return "gate.kl_weight", text


def _top_k(config: RunConfig) -> Complaint | None:
    missing = config.gate.select == "top_k" and config.gate.top_k is None
    return ("gate.select", "gate.select top_k needs gate.top_k; set it") if missing else None


def _text_layer(config: RunConfig) -> Complaint | None:
    missing = config.gate.text == "layer" and config.gate.text_layer is None
    return ("gate.text", "gate.text layer needs gate.text_layer; set it") if missing else None


def _one_constant(config: RunConfig) -> Complaint | None:
    """A top-1 gate's weight is the constant 1: the model's loss teaches it nothing."""
    stage, select, top_k = config.gate.stage, config.gate.select, config.gate.top_k
    if stage == "supervised" or (select, top_k) != ("top_k", 1):
        return None
    text = f"gate.select top_k with gate.top_k 1 learns nothing from the answers of stage {stage}; use hard"
    return "gate.select", text


def _per_token_text(config: RunConfig) -> Complaint | None:
    if config.gate.per != "token" or config.gate.text == "embeddings":
        return None
    text = f"gate.per token reads each token's own embedding; gate.text {config.gate.text} would not be used"
    return "gate.text", text


CONTRADICTIONS: list[Contradiction] = [
    in_task("gate", rule)
    for rule in (
        _adapters,
        _labelled_data,
        _alone,
        _reference,
        _top_k,
        _text_layer,
        _one_constant,
        _per_token_text,
    )
]
