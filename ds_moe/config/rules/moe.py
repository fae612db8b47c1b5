"""Rules about `moe`, but for replay, and about `train.stage: router_only`, which needs routers that learn."""

from collections import Counter

from ds_moe.config.moe import RouterConfig, TopKRouting
from ds_moe.config.rules.rule import Complaint, Contradiction, Unused
from ds_moe.config.run import RunConfig

# --- keys without effect


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


def _no_chunks(config: RunConfig) -> str | None:
    alone = config.moe is not None and config.moe.ep_size == 1
    return "moe.ep_size is 1, so no rows travel" if alone else None


def _no_recompute(config: RunConfig) -> str | None:
    if config.moe is not None and config.moe.experts.backend in ("reference", "liger"):
        return f"moe.experts.backend {config.moe.experts.backend} decides that itself"
    updated = config.lora is not None and config.lora.experts
    return "the experts have LoRA updates, and autograd keeps what it needs" if updated else None


UNUSED: dict[str, Unused] = {
    "moe.router.order": _no_order,
    "moe.router.normalize": _no_normalize,
    "moe.router.drop": _no_drop,
    "moe.dispatch.chunks": _no_chunks,
    "moe.experts.recompute": _no_recompute,
}


# --- contradictions


def _dispatch(config: RunConfig) -> Complaint | None:
    if config.moe is None or config.moe.dispatch.kind == "auto":
        return None
    ep_size, kind = config.moe.ep_size, config.moe.dispatch.kind
    if (kind == "local") == (ep_size == 1):
        return None
    need = "1" if kind == "local" else "more than 1"
    key = "moe.dispatch.kind"
    return key, f"{key} {kind} needs moe.ep_size {need}, which is {ep_size}; write auto"


def _balance(config: RunConfig) -> Complaint | None:
    kinds = Counter(balance.kind for balance in config.moe.balance) if config.moe else Counter()
    twice = [kind for kind, count in kinds.items() if count > 1]
    if twice:
        return "moe.balance", f"moe.balance lists {twice[0]} {kinds[twice[0]]} times; list each kind once"
    if "none" in kinds and len(kinds) > 1:
        others = ", ".join(kind for kind in kinds if kind != "none")
        return "moe.balance", f"moe.balance lists none beside {others}; remove none"
    return None


def _useless_balance(config: RunConfig) -> Complaint | None:
    if config.moe is None:
        return None
    router = config.moe.router
    useless = [balance.kind for balance in config.moe.balance if balance.kind in router.useless_balances]
    if not useless:
        return None
    reason = "gives all experts the same load" if router.learns else "learns nothing"
    text = f"moe.balance {useless[0]} would not be used: moe.router.kind {router.kind} {reason}; remove it"
    return "moe.balance", text


def noncausal(router: RouterConfig) -> str | None:
    """Why a causal language model must not have this router, unless the run file allows it."""
    if router.causal or getattr(router, "allow_noncausal", False):
        return None
    return (
        f"moe.router.kind {router.kind} makes a token's experts depend on later tokens: a causal language model "
        "trained so leaks the future and cannot generate; choose topk, or set moe.router.allow_noncausal to true to "
        "study it"
    )


def _causal(config: RunConfig) -> Complaint | None:
    router = config.moe.router if config.moe else None
    if router is None or router.causal:
        return None
    if leak := noncausal(router):
        return "moe.router.kind", leak
    if config.data.eval is None or not config.train.eval_generate:
        return None
    text = f"moe.router.kind {router.kind} cannot generate answers; set train.eval_generate to false"
    return "train.eval_generate", text


def _groups(config: RunConfig) -> Complaint | None:
    router = config.moe.router if config.moe else None
    if not isinstance(router, TopKRouting) or (router.groups is None) == (router.top_groups is None):
        return None
    there, lacking = ("groups", "top_groups") if router.top_groups is None else ("top_groups", "groups")
    text = f"moe.router.{there} is {getattr(router, there)} and moe.router.{lacking} is not set; set both or none"
    return f"moe.router.{there}", text


def _router_only(config: RunConfig) -> Complaint | None:
    if config.train.stage == "all":
        return None
    if config.moe is None:
        return "train.stage", "train.stage router_only needs routers, and there is no moe section"
    if config.moe.router.learns:
        return None
    kind = config.moe.router.kind
    return "train.stage", f"train.stage router_only would train nothing: moe.router.kind {kind} learns nothing"


CONTRADICTIONS: list[Contradiction] = [
    _dispatch,
    _balance,
    _useless_balance,
    _causal,
    _groups,
    _router_only,
]
