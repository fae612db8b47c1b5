"""Rules about `task: gate` and its section `gate`."""

from collections.abc import Iterator

from ds_moe.config.rules.rule import Complaint, Unused, in_task, needs, read_in
from ds_moe.config.run import RunConfig, task_is


def no_answers(config: RunConfig) -> str | None:
    """Why evaluation generates no answers, where that is because of the gate's stage."""
    supervised = task_is(config, "gate") and config.gate.stage == "supervised"
    return "gate.stage supervised learns which adapter, and answers nothing" if supervised else None


def _no_temperature(config: RunConfig) -> str | None:
    reason = "gate.select top_k with gate.top_k 1 has weights of 1 at any temperature"
    return reason if (config.gate.select, config.gate.top_k) == ("top_k", 1) else None


_no_text = needs("gate.modalities", "both", "text")
UNUSED: dict[str, Unused] = {
    "gate": read_in("gate"),
    "gate.text": in_task("gate", _no_text),
    "gate.text_layer": in_task("gate", lambda config: _no_text(config) or needs("gate.text", "layer")(config)),
    "gate.vision": needs("gate.modalities", "both", "vision"),
    "gate.top_k": in_task("gate", needs("gate.select", "top_k")),
    "gate.temperature": _no_temperature,
    "gate.class_weights": in_task("gate", needs("gate.stage", "supervised")),
    "gate.entropy_weight": in_task("gate", needs("gate.stage", "end_to_end", "joint")),
    "gate.kl_weight": in_task("gate", needs("gate.stage", "end_to_end", "joint")),
    "gate.adapter_lr": in_task("gate", needs("gate.stage", "joint")),
}


def over_experts(config: RunConfig) -> Complaint:
    """That a gate's base must be dense: said at once, whether the section tells or the model's config."""
    base = "model.path" if config.model.preset is None else "model.preset"
    text = f"task gate cannot gate a model with experts: name a dense one in {base}, and write no section moe"
    return (base if config.moe is None else "moe"), text


def contradictions(config: RunConfig) -> Iterator[Complaint]:
    if not task_is(config, "gate"):
        return
    gate, data = config.gate, config.data
    if not gate.adapters and gate.adapters_in is None:
        yield "gate", "neither gate.adapters nor gate.adapters_in is set; name the adapters, or their folder"
    if "digits" in (data.train, data.eval):
        key = "data.train" if data.train == "digits" else "data.eval"
        yield key, f'{key} is "digits", whose records name no adapter; give a JSONL file'
    if config.moe is not None:
        yield over_experts(config)
    elif config.lora is not None:
        yield "lora", "section lora would not be used: task gate brings the adapters itself; remove it"
    elif config.model.freeze:
        yield "model.freeze", "model.freeze would not be used: task gate freezes the whole model; remove it"
    if gate.kl_weight and gate.start is None:
        text = "gate.kl_weight holds the gate near that of gate.start, which is not set; name the supervised run"
        yield "gate.kl_weight", text
    if gate.select == "top_k" and gate.top_k is None:
        yield "gate.select", "gate.select top_k needs gate.top_k; set it"
    if gate.text == "layer" and gate.text_layer is None:
        yield "gate.text", "gate.text layer needs gate.text_layer; set it"
    if gate.stage != "supervised" and (gate.select, gate.top_k) == ("top_k", 1):  # its weight is the constant 1
        text = f"gate.select top_k with gate.top_k 1 learns nothing from the answers of stage {gate.stage}; use hard"
        yield "gate.select", text
    if gate.per == "token" and gate.text != "embeddings":
        text = f"gate.per token reads each token's own embedding; gate.text {gate.text} would not be used"
        yield "gate.text", text
