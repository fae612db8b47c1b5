"""Rules about `task: gate` and its section `gate`."""

from collections.abc import Iterator

from ds_moe.config.moe import MoEConfig, TopKRouting
from ds_moe.config.rules.rule import Complaint, Unused, in_task, needs, read_in
from ds_moe.config.run import RunConfig, task_is
from ds_moe.config.sections import has_digits


def _supervised(config: RunConfig) -> bool:
    return task_is(config, "gate") and config.gate.stage == "supervised"


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


def no_routing(config: RunConfig) -> str | None:
    """Why no expert load is counted, where that is because of the gate's stage."""
    return "gate.stage supervised trains without the experts" if _supervised(config) else None


def contradictions(config: RunConfig) -> Iterator[Complaint]:
    if not task_is(config, "gate"):
        return
    gate, data = config.gate, config.data
    if not gate.adapters and gate.adapters_in is None:
        yield "gate", "neither gate.adapters nor gate.adapters_in is set; name the adapters, or their folder"
    if has_digits(data.train) or has_digits(data.eval):
        key = "data.train" if has_digits(data.train) else "data.eval"
        yield key, f'{key} is "digits", whose records name no adapter; give a JSONL file'
    if config.lora is not None:
        yield "lora", "section lora would not be used: task gate brings the adapters itself; remove it"
    elif config.model.freeze:
        yield "model.freeze", "model.freeze would not be used: task gate freezes the whole model; remove it"
    if config.moe is not None:
        yield from _frozen_routing(config.moe)
        if config.train.stage != "all":
            text = f"train.stage {config.train.stage} would not be used: task gate freezes the routers; remove it"
            yield "train.stage", text
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


def _frozen_routing(moe: MoEConfig) -> Iterator[Complaint]:
    """What would change the frozen base, whose adapters were trained upon its own routing."""
    frozen = "task gate freezes the base, whose adapters were trained upon its own routing"
    default = TopKRouting().model_dump()
    if changed := [key for key, value in moe.router.model_dump().items() if value != default.get(key)]:
        key = f"moe.router.{changed[0]}"
        yield key, f"{key} {getattr(moe.router, changed[0])} would change the routing: {frozen}; remove it"
    if balances := [balance.kind for balance in moe.balance if balance.kind != "none"]:
        text = f"moe.balance {balances[0]} would not be used: task gate freezes the routers; remove it"
        yield "moe.balance", text
    if moe.experts.apply_weight != "after":
        key = "moe.experts.apply_weight"
        yield key, f"{key} {moe.experts.apply_weight} would change the base: {frozen}; remove it"
