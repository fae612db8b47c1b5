"""Rules about `lora`, and about what it takes the place of."""

from collections.abc import Iterator

from ds_moe.config.rules.rule import Complaint, Unused, no_moe
from ds_moe.config.run import RunConfig

ALIGNED = 8  # rows of a grouped GEMM are multiples of 16 bytes: 8 numbers of bf16
UNUSED: dict[str, Unused] = {
    "lora.experts": no_moe,
    "lora.train_router": no_moe,
    "model.freeze": lambda config: "lora freezes the whole model" if config.lora else None,
}


def contradictions(config: RunConfig) -> Iterator[Complaint]:
    lora, moe = config.lora, config.moe
    if lora is None:
        return
    if not (lora.targets or lora.experts or lora.train_router):
        text = "lora.targets is empty and lora.experts and lora.train_router are false: nothing would be trained"
        yield "lora.targets", text
    if lora.experts and lora.rank % ALIGNED:
        text = f"lora.rank {lora.rank} is no multiple of {ALIGNED}, which lora.experts needs (grouped GEMM)"
        yield "lora.rank", text
    if config.train.stage == "router_only":
        text = "train.stage router_only trains routers in full and nothing else; remove it, or the lora section"
        yield "train.stage", text
    if lora.train_router and moe is not None and not moe.router.learns:
        yield "lora.train_router", f"moe.router.kind {moe.router.kind} learns nothing: set lora.train_router false"
    if lora.experts and moe is not None and moe.experts.backend == "liger":
        text = "moe.experts.backend liger would not be used: experts with LoRA updates need torch's products"
        yield "moe.experts.backend", f"{text}; write auto"


def base_changes(config: RunConfig) -> str | None:
    """Why the model without its low-rank updates is not the one that the run started from; None: it is."""
    if config.lora is None:
        return "there is no lora section"
    if config.lora.train_router:
        return "lora.train_router trains the routers themselves"
    biased = config.moe is not None and any(balance.kind == "loss_free" for balance in config.moe.balance)
    return "moe.balance loss_free moves the routers' biases" if biased else None
