"""Rules of a run file about `lora`; `check.py` takes them into its tables."""

from __future__ import annotations

from collections.abc import Callable

from ds_moe.config.rules.rule import Complaint
from ds_moe.config.run import RunConfig

ALIGNED = 8  # rows of a grouped GEMM are multiples of 16 bytes: 8 numbers of bf16


def _no_experts(config: RunConfig) -> str | None:
    return None if config.moe else "there is no moe section"


LORA_UNUSED: dict[str, Callable[[RunConfig], str | None]] = {
    "lora.experts": _no_experts,
    "lora.train_router": _no_experts,
    "model.freeze": lambda config: "lora freezes the whole model" if config.lora else None,
}


def _something_to_train(config: RunConfig) -> Complaint:
    lora = config.lora
    nothing = lora is not None and not (lora.targets or lora.experts or lora.train_router)
    text = "lora.targets is empty and lora.experts and lora.train_router are false: nothing would be trained"
    return "lora.targets", text if nothing else None


def _aligned(config: RunConfig) -> Complaint:
    lora = config.lora
    wrong = lora is not None and lora.experts and lora.rank % ALIGNED
    text = f"lora.rank {lora.rank if lora else 0} is no multiple of {ALIGNED}, which lora.experts needs (grouped GEMM)"
    return "lora.rank", text if wrong else None


def _stage(config: RunConfig) -> Complaint:
    wrong = config.lora is not None and config.train.stage == "router_only"
    text = "train.stage router_only trains routers in full and nothing else; remove it, or the lora section"
    return "train.stage", text if wrong else None


def _fixed_router(config: RunConfig) -> Complaint:
    wrong = config.lora and config.lora.train_router and config.moe and not config.moe.router.learns
    kind = config.moe.router.kind if config.moe else ""
    return "lora.train_router", f"moe.router.kind {kind} learns nothing: set lora.train_router false" if wrong else None


def _liger(config: RunConfig) -> Complaint:
    wrong = config.lora and config.lora.experts and config.moe and config.moe.experts.backend == "liger"
    text = "moe.experts.backend liger would not be used: experts with LoRA updates need torch's products; write auto"
    return "moe.experts.backend", text if wrong else None


LORA_CONTRADICTIONS: list[Callable[[RunConfig], Complaint]] = [
    _something_to_train,
    _aligned,
    _stage,
    _fixed_router,
    _liger,
]
