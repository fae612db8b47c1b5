"""Rules of a run file about `moe`."""

from __future__ import annotations

from collections import Counter

from ds_moe.config.moe import RouterConfig, TopKRouting
from ds_moe.config.rules.rule import Complaint
from ds_moe.config.run import RunConfig


def _no_order(config: RunConfig) -> str | None:
    router = config.moe.router if config.moe else None
    sigmoid = isinstance(router, TopKRouting) and router.scores == "sigmoid"
    return "moe.router.scores is sigmoid, which scores each expert alone, before or after" if sigmoid else None


def _no_normalize(config: RunConfig) -> str | None:
    router = config.moe.router if config.moe else None
    sums_to_1 = isinstance(router, TopKRouting) and router.order == "topk_then_softmax" and not _no_order(config)
    return "moe.router.order is topk_then_softmax, whose weights sum to 1 anyway" if sums_to_1 else None


def _no_chunks(config: RunConfig) -> str | None:
    alone = config.moe is not None and config.moe.ep_size == 1
    return "moe.ep_size is 1, so no rows travel" if alone else None


def _no_recompute(config: RunConfig) -> str | None:
    if config.moe is not None and config.moe.experts.backend in ("reference", "liger"):
        return f"moe.experts.backend {config.moe.experts.backend} decides that itself"
    updated = config.lora is not None and config.lora.experts
    return "the experts have LoRA updates, and autograd keeps what it needs" if updated else None


def _no_drop(config: RunConfig) -> str | None:
    router = config.moe.router if config.moe else None
    dropless = isinstance(router, TopKRouting) and router.capacity_factor is None
    return "moe.router.capacity_factor is not set, so nothing is dropped" if dropless else None


def _dispatch(config: RunConfig) -> Complaint:
    key = "moe.dispatch.kind"
    if not config.moe or config.moe.dispatch.kind == "auto":
        return key, None
    ep_size, kind = config.moe.ep_size, config.moe.dispatch.kind
    fits = (kind == "local") == (ep_size == 1)
    need = "1" if kind == "local" else "more than 1"
    return key, None if fits else f"{key} {kind} needs moe.ep_size {need}, which is {ep_size}; write auto"


def _balance(config: RunConfig) -> Complaint:
    kinds = Counter(balance.kind for balance in config.moe.balance) if config.moe else Counter()
    twice = [kind for kind, count in kinds.items() if count > 1]
    if twice:
        return "moe.balance", f"moe.balance lists {twice[0]} {kinds[twice[0]]} times; list each kind once"
    if "none" in kinds and len(kinds) > 1:
        others = ", ".join(kind for kind in kinds if kind != "none")
        return "moe.balance", f"moe.balance lists none beside {others}; remove none"
    return "moe.balance", None


def noncausal(router: RouterConfig) -> str | None:
    """Why a causal language model must not have this router, unless the run file allows it."""
    if router.causal or getattr(router, "allow_noncausal", False):
        return None
    return (
        f"moe.router.kind {router.kind} makes a token's experts depend on later tokens: a causal language model "
        "trained so leaks the future and cannot generate; choose topk, or set moe.router.allow_noncausal to true to "
        "study it"
    )


def _causal(config: RunConfig) -> Complaint:
    router = config.moe.router if config.moe else None
    if router is None or router.causal:
        return "moe.router.kind", None
    if leak := noncausal(router):
        return "moe.router.kind", leak
    generates = config.data.eval is not None and config.train.eval_generate
    text = f"moe.router.kind {router.kind} cannot generate answers; set train.eval_generate to false"
    return "train.eval_generate", text if generates else None


def _router_groups(config: RunConfig) -> Complaint:
    router = config.moe.router if config.moe else None
    if not isinstance(router, TopKRouting) or (router.groups is None) == (router.top_groups is None):
        return "moe.router", None
    there, lacking = ("groups", "top_groups") if router.top_groups is None else ("top_groups", "groups")
    text = f"moe.router.{there} is {getattr(router, there)} and moe.router.{lacking} is not set; set both or none"
    return f"moe.router.{there}", text


def _balance_effect(config: RunConfig) -> Complaint:
    """Balancers that cannot change what this router does."""
    if config.moe is None:
        return "moe.balance", None
    router = config.moe.router
    useless = next((balance.kind for balance in config.moe.balance if balance.kind in router.useless_balances), None)
    reason = "gives all experts the same load" if router.learns else "learns nothing"
    text = f"moe.balance {useless} would not be used: moe.router.kind {router.kind} {reason}; remove it"
    return "moe.balance", text if useless else None
