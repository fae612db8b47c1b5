"""Rules about a run and its model's config (of transformers): experts, routers and images that the model must have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ds_moe.config.divisors import divisors, ep_size_problem
from ds_moe.config.moe import RouterConfig, TopKRouting
from ds_moe.config.rules.rule import Complaint, written
from ds_moe.config.run import RunConfig, task_is
from ds_moe.config.sections import has_digits

if TYPE_CHECKING:  # `ds-moe train` reads a run file without torch and transformers
    from transformers import PretrainedConfig

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk")


def expert_count(model_config: PretrainedConfig) -> int | None:
    """Experts of each MoE block, as the config spells it, or None for a dense model."""
    text = model_config.get_text_config()
    return next((found for key in EXPERTS if (found := getattr(text, key, None)) is not None), None)


def experts_per_token(model_config: PretrainedConfig) -> int:
    """Experts of a token in a model that has experts, as its config spells it; of layers that differ, the most."""
    text = model_config.get_text_config()
    found = next(found for key in TOP_K if (found := getattr(text, key, None)) is not None)
    return found if isinstance(found, int) else max(found)


def contradictions(
    config: RunConfig, model_config: PretrainedConfig, world_size: int | None = None
) -> Iterator[Complaint]:
    yield from _moe_section(config, model_config, world_size)
    yield from _vision(config, model_config)
    yield from _shared_rows(config.train.sequence_parallel, model_config)


def _moe_section(config: RunConfig, model_config: PretrainedConfig, world_size: int | None) -> Iterator[Complaint]:
    kind, experts = model_config.model_type, expert_count(model_config)
    if config.moe is None:
        if experts:
            text = f"a {kind} model has experts but the run has no moe section; add `moe:` (with ep_size below it)"
            yield "moe", text
        return
    if experts is None:
        yield "moe", f"section moe would not be used: {kind} is a dense model; remove it (override: moe=null)"
        return
    ep_size, top_k, chunks = config.moe.ep_size, config.moe.router.top_k, config.moe.dispatch.chunks
    if problem := ep_size_problem(ep_size, world_size, experts, of="experts"):
        yield "moe.ep_size", problem
    elif experts // ep_size % chunks:
        local = experts // ep_size
        yield "moe.dispatch.chunks", f"moe.dispatch.chunks {chunks} does not divide a rank's {local} experts"
    if top_k is not None and top_k > experts:
        yield "moe.router.top_k", f"moe.router.top_k {top_k} exceeds the model's {experts} experts"
        return
    yield from _router(config.moe.router, experts, experts_per_token(model_config))


def _shared_rows(ranks: int, model_config: PretrainedConfig) -> Iterator[Complaint]:
    if ranks > 1 and (heads := model_config.get_text_config().num_attention_heads) % ranks:
        text = f"train.sequence_parallel {ranks} does not divide the model's {heads} attention heads"
        yield "train.sequence_parallel", f"{text} ({divisors(heads)})"


def _router(router: RouterConfig, experts: int, models_top_k: int) -> Iterator[Complaint]:
    top_k = router.top_k or models_top_k
    if isinstance(router, TopKRouting) and router.groups and router.top_groups:
        groups, held = router.groups, router.top_groups * experts // router.groups
        if experts % groups:
            yield "moe.router.groups", f"moe.router.groups {groups} does not divide the {experts} experts"
        elif router.top_groups > groups:
            text = f"moe.router.top_groups {router.top_groups} exceeds moe.router.groups {groups}"
            yield "moe.router.top_groups", text
        elif held < top_k:
            text = f"moe.router.top_groups {router.top_groups} leaves {held} experts, fewer than the top_k of {top_k}"
            yield "moe.router.top_groups", text
    if router.expert_dropout and top_k == 1 and router.exact_k:
        text = "moe.router.expert_dropout would not be used: a token has one expert only, which it keeps; remove it"
        yield "moe.router.expert_dropout", text


def _vision(config: RunConfig, model_config: PretrainedConfig) -> Iterator[Complaint]:
    if hasattr(model_config, "vision_config"):
        return
    kind = model_config.model_type
    if task_is(config, "gate"):
        key = "model.path" if config.model.preset is None else "model.preset"
        yield key, f"task gate needs a vision-language model, and {key} is a {kind}; name another"
    for key, given in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if has_digits(given):
            yield key, f'{key} is "digits", images that the text-only {kind} model cannot see'
    for key in ("data.root", "data.max_pixels"):
        if written(config, key):
            yield key, f"{key} would not be used: {kind} takes no images; remove it"
