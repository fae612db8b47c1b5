"""Rules about `moe`, but for replay, and about `train.stage: router_only`, which needs routers that learn."""

from collections import Counter
from collections.abc import Iterator

from ds_moe.config.moe import MoEConfig, RouterConfig, TopKRouting
from ds_moe.config.rules.rule import Complaint, Unused
from ds_moe.config.run import RunConfig


def _no_order(config: RunConfig) -> str | None:
    router = config.moe.router if config.moe else None
    sigmoid = isinstance(router, TopKRouting) and router.scores == "sigmoid"
    return "moe.router.scores is sigmoid, which scores each expert alone, before or after" if sigmoid else None


def _no_normalize(config: RunConfig) -> str | None:
    router = config.moe.router if config.moe else None
    sums_to_1 = isinstance(router, TopKRouting) and router.order == "topk_then_softmax" and not _no_order(config)
    return "moe.router.order is topk_then_softmax, whose weights sum to 1 anyway" if sums_to_1 else None


def _no_drop(config: RunConfig) -> str | None:
    router = config.moe.router if config.moe else None
    dropless = isinstance(router, TopKRouting) and router.capacity_factor is None
    return "moe.router.capacity_factor is not set, so nothing is dropped" if dropless else None


def _no_recompute(config: RunConfig) -> str | None:
    if config.moe is not None and config.moe.experts.backend in ("reference", "liger"):
        return f"moe.experts.backend {config.moe.experts.backend} decides that itself"
    updated = config.lora is not None and config.lora.experts
    return "the experts have LoRA updates, and autograd keeps what it needs" if updated else None


UNUSED: dict[str, Unused] = {
    "moe.router.order": _no_order,
    "moe.router.normalize": _no_normalize,
    "moe.router.drop": _no_drop,
    "moe.dispatch.chunks": lambda c: "moe.ep_size is 1, so no rows travel" if c.moe and c.moe.ep_size == 1 else None,
    "moe.experts.recompute": _no_recompute,
}


def noncausal(router: RouterConfig) -> str | None:
    """Why a causal language model must not have this router, unless the run file allows it."""
    if router.causal or getattr(router, "allow_noncausal", False):
        return None
    return (
        f"moe.router.kind {router.kind} makes a token's experts depend on later tokens: a causal language model "
        "trained so leaks the future and cannot generate; choose topk, or set moe.router.allow_noncausal to true to "
        "study it"
    )


def contradictions(config: RunConfig) -> Iterator[Complaint]:
    moe = config.moe
    if moe is None:
        if config.train.stage != "all":
            yield "train.stage", "train.stage router_only needs routers, and there is no moe section"
        return
    kind, router = moe.dispatch.kind, moe.router
    if kind != "auto" and (kind == "local") != (moe.ep_size == 1):
        key, need = "moe.dispatch.kind", "1" if kind == "local" else "more than 1"
        yield key, f"{key} {kind} needs moe.ep_size {need}, which is {moe.ep_size}; write auto"
    yield from _balance(moe)
    if not router.causal:
        if leak := noncausal(router):
            yield "moe.router.kind", leak
        elif config.data.eval is not None and config.train.eval_generate:
            text = f"moe.router.kind {router.kind} cannot generate answers; set train.eval_generate to false"
            yield "train.eval_generate", text
    if isinstance(router, TopKRouting) and (router.groups is None) != (router.top_groups is None):
        there, lacking = ("groups", "top_groups") if router.top_groups is None else ("top_groups", "groups")
        text = f"moe.router.{there} is {getattr(router, there)} and moe.router.{lacking} is not set; set both or none"
        yield f"moe.router.{there}", text
    if config.train.stage != "all" and not router.learns:
        text = f"train.stage router_only would train nothing: moe.router.kind {router.kind} learns nothing"
        yield "train.stage", text


def _balance(moe: MoEConfig) -> Iterator[Complaint]:
    router, kinds = moe.router, Counter(balance.kind for balance in moe.balance)
    if twice := [kind for kind, count in kinds.items() if count > 1]:
        yield "moe.balance", f"moe.balance lists {twice[0]} {kinds[twice[0]]} times; list each kind once"
    elif "none" in kinds and len(kinds) > 1:
        others = ", ".join(kind for kind in kinds if kind != "none")
        yield "moe.balance", f"moe.balance lists none beside {others}; remove none"
    if useless := [kind for kind in kinds if kind in router.useless_balances]:
        reason = "gives all experts the same load" if router.learns else "learns nothing"
        text = f"moe.balance {useless[0]} would not be used: moe.router.kind {router.kind} {reason}; remove it"
        yield "moe.balance", text
