"""Rules about `lora`, and about what it takes the place of."""

from ds_moe.config.rules.rule import Complaint, Contradiction, Unused
from ds_moe.config.run import RunConfig

ALIGNED = 8  # rows of a grouped GEMM are multiples of 16 bytes: 8 numbers of bf16


# --- keys without effect


def _no_experts(config: RunConfig) -> str | None:
    return None if config.moe else "there is no moe section"


UNUSED: dict[str, Unused] = {
    "lora.experts": _no_experts,
    "lora.train_router": _no_experts,
    "model.freeze": lambda config: "lora freezes the whole model" if config.lora else None,
}


# --- contradictions


def _something_to_train(config: RunConfig) -> Complaint | None:
    lora = config.lora
    if lora is None or lora.targets or lora.experts or lora.train_router:
        return None
    text = "lora.targets is empty and lora.experts and lora.train_router are false: nothing would be trained"
    return "lora.targets", text


def _aligned(config: RunConfig) -> Complaint | None:
    lora = config.lora
    if lora is None or not lora.experts or lora.rank % ALIGNED == 0:
        return None
    text = f"lora.rank {lora.rank} is no multiple of {ALIGNED}, which lora.experts needs (grouped GEMM)"
    return "lora.rank", text


def _whole_routers(config: RunConfig) -> Complaint | None:
    if config.lora is None or config.train.stage != "router_only":
        return None
    text = "train.stage router_only trains routers in full and nothing else; remove it, or the lora section"
    return "train.stage", text


def _fixed_router(config: RunConfig) -> Complaint | None:
    if config.lora is None or not config.lora.train_router or config.moe is None or config.moe.router.learns:
        return None
    text = f"moe.router.kind {config.moe.router.kind} learns nothing: set lora.train_router false"
    return "lora.train_router", text


def _liger(config: RunConfig) -> Complaint | None:
    if config.lora is None or not config.lora.experts or config.moe is None or config.moe.experts.backend != "liger":
        return None
    text = "moe.experts.backend liger would not be used: experts with LoRA updates need torch's products; write auto"
    return "moe.experts.backend", text


CONTRADICTIONS: list[Contradiction] = [
    _something_to_train,
    _aligned,
    _whole_routers,
    _fixed_router,
    _liger,
]
