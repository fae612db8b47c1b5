"""Rules that need the model's config: experts, routers and images that it must have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_moe.config.moe import RouterConfig, TopKRouting
from ds_moe.config.rules.rule import written
from ds_moe.config.run import RunConfig

if TYPE_CHECKING:  # `ds-moe train` reads a run file without torch and transformers
    from transformers import PretrainedConfig

Complaints = list[tuple[str, str]]


def expert_count(model_config: PretrainedConfig) -> int | None:
    """Experts of each MoE block (attribute_map hides two spellings), or None for a dense model."""
    return getattr(model_config.get_text_config(), "num_experts", None)


def _moe_section(config: RunConfig, model_config: PretrainedConfig) -> Complaints:
    kind, experts = model_config.model_type, expert_count(model_config)
    if config.moe is None:
        text = f"a {kind} model has experts but the run has no moe section; add `moe:` (with ep_size below it)"
        return [("moe", text)] if experts else []
    if experts is None:
        return [("moe", f"section moe would not be used: {kind} is a dense model; remove it (override: moe=null)")]
    found: Complaints = []
    ep_size, top_k = config.moe.ep_size, config.moe.router.top_k
    if experts % ep_size:
        fits = ", ".join(str(size) for size in range(1, experts + 1) if experts % size == 0)
        text = f"moe.ep_size {ep_size} does not divide the model's {experts} experts ({fits} do)"
        found.append(("moe.ep_size", text))
    elif experts // ep_size % config.moe.dispatch.chunks:
        chunks, local = config.moe.dispatch.chunks, experts // ep_size
        found.append(("moe.dispatch.chunks", f"moe.dispatch.chunks {chunks} does not divide a rank's {local} experts"))
    if top_k is not None and top_k > experts:
        found.append(("moe.router.top_k", f"moe.router.top_k {top_k} exceeds the model's {experts} experts"))
        return found
    return found + _router(config.moe.router, experts, model_config.get_text_config().num_experts_per_tok)


def _router(router: RouterConfig, experts: int, models_top_k: int) -> Complaints:
    top_k = router.top_k or models_top_k
    found: Complaints = []
    if isinstance(router, TopKRouting) and router.groups and router.top_groups:
        groups, held = router.groups, router.top_groups * experts // router.groups
        if experts % groups:
            found.append(("moe.router.groups", f"moe.router.groups {groups} does not divide the {experts} experts"))
        elif router.top_groups > groups:
            text = f"moe.router.top_groups {router.top_groups} exceeds moe.router.groups {groups}"
            found.append(("moe.router.top_groups", text))
        elif held < top_k:
            text = f"moe.router.top_groups {router.top_groups} leaves {held} experts, fewer than the top_k of {top_k}"
            found.append(("moe.router.top_groups", text))
    if router.expert_dropout and top_k == 1 and router.exact_k:
        text = "moe.router.expert_dropout would not be used: a token has one expert only, which it keeps; remove it"
        found.append(("moe.router.expert_dropout", text))
    return found


def _vision(config: RunConfig, model_config: PretrainedConfig) -> Complaints:
    if hasattr(model_config, "vision_config"):
        return []
    kind = model_config.model_type
    found = [
        (f"data.{split}", f'data.{split} is "digits", images that the text-only {kind} model cannot see')
        for split in ("train", "eval")
        if getattr(config.data, split) == "digits"
    ]
    reads_images = [key for key in ("data.root", "data.max_pixels") if written(config, key)]
    return found + [(key, f"{key} would not be used: {kind} takes no images; remove it") for key in reads_images]


MODEL_RULES = [_moe_section, _vision]
