"""Rules of a run file that types cannot say: contradictions, and keys that this run would not use.

Each rule is a line of a table. `check_used` and `check_model` raise the first complaint as a `UserError`; `problems`
and `model_problems` list them all, each one line that names the place, the key and the fix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ds_moe.checks_gate import GATE_CONTRADICTIONS, GATE_UNUSED, no_answers
from ds_moe.checks_lora import LORA_CONTRADICTIONS, LORA_UNUSED
from ds_moe.checks_rl import RL_CONTRADICTIONS, RL_UNUSED, Complaint
from ds_moe.config import ExpertChoiceRouting, RouterConfig, RunConfig, TopKRouting
from ds_moe.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_used(config: RunConfig) -> None:
    """Raise `UserError` for the first contradiction or unused key of a run, as far as the run file alone tells."""
    _raise_first(problems(config))


def check_model(config: RunConfig, model_config: PretrainedConfig) -> None:
    """Raise `UserError` for the first key that does not fit this model (a transformers config, read before loading)."""
    _raise_first(model_problems(config, model_config))


def problems(config: RunConfig) -> list[str]:
    """Every contradiction and unused key of a run file."""
    contradictions = [(key, text) for rule in CONTRADICTIONS for key, text in [rule(config)] if text]
    lines = [f"{config.at(key)}: {text}" for key, text in contradictions]
    for key, reason in unused_keys(config).items():
        if written(config, key):
            lines.append(f"{config.at(key)}: {key} would not be used: {reason}; remove it")
    return lines


def model_problems(config: RunConfig, model_config: PretrainedConfig) -> list[str]:
    """Every key of a run file that contradicts the model: MoE or dense, number of experts, vision or text only."""
    return [f"{config.at(key)}: {text}" for rule in MODEL_RULES for key, text in rule(config, model_config)]


def warmup_problem(config: RunConfig, total_steps: int) -> str | None:
    """The complaint about a warm-up that does not end within `total_steps`, which under train.epochs the data tell."""
    key, text = _warmup(config, total_steps)
    return None if text is None else f"{config.at(key)}: {text}"


def unused_keys(config: RunConfig) -> dict[str, str]:
    """Dotted keys that this run would not use, written or not, each with the reason."""
    reasons = {key: rule(config) for key, rule in UNUSED.items()}
    return {key: reason for key, reason in reasons.items() if reason}


def used_keys(config: RunConfig) -> dict[str, Any]:
    """The tree as plain data without the keys that this run would not use and without keys that are not set."""
    unused = unused_keys(config)

    def prune(value: Any, key: str) -> Any:
        if not isinstance(value, dict):
            return value
        children = {name: (f"{key}.{name}" if key else name, child) for name, child in value.items()}
        return {n: prune(child, k) for n, (k, child) in children.items() if k not in unused and child is not None}

    return prune(config.model_dump(mode="json"), "")


def written(config: BaseModel, key: str) -> bool:
    """Whether the run file or an override sets this dotted key to something other than null."""
    name, _, rest = key.partition(".")
    value = getattr(config, name, None)  # not every kind of router has every key
    if name not in config.model_fields_set or value is None:
        return False
    return written(value, rest) if rest else True


def _raise_first(lines: list[str]) -> None:
    if lines:
        raise UserError(lines[0])


# --- keys without effect: dotted key -> why this run would not use it, or None where it would


def _no_eval(config: RunConfig) -> str | None:
    return None if config.data.eval else "data.eval is not set, so nothing is evaluated"


def _no_generation(config: RunConfig) -> str | None:
    return _no_answers(config) or (None if config.train.eval_generate else "train.eval_generate is false")


def _no_answers(config: RunConfig) -> str | None:
    return _no_eval(config) or no_answers(config)


def _no_samples(config: RunConfig) -> str | None:
    """A supervised gate shows the adapters that it chooses, other runs what was generated."""
    return _no_tensorboard(config) or _no_eval(config) or (None if no_answers(config) else _no_generation(config))


def _no_periodic_eval(config: RunConfig) -> str | None:
    reason = "train.eval_every is not set, and the evaluation at the end takes all of data.eval"
    return _no_eval(config) or (None if config.train.eval_every else reason)


def _no_tensorboard(config: RunConfig) -> str | None:
    return None if config.monitor.tensorboard else "monitor.tensorboard is false"


def _no_files(config: RunConfig) -> str | None:
    bundled = {config.data.train, config.data.eval} <= {"digits", None}
    return 'the data is "digits", which reads no files' if bundled else None


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


UNUSED: dict[str, Callable[[RunConfig], str | None]] = {
    **RL_UNUSED,
    **LORA_UNUSED,
    **GATE_UNUSED,
    "moe.router.order": _no_order,
    "moe.router.normalize": _no_normalize,
    "moe.router.drop": _no_drop,
    "moe.dispatch.chunks": _no_chunks,
    "moe.experts.recompute": _no_recompute,
    "data.root": _no_files,
    "data.length_grouping": lambda c: None if c.train.global_batch_size > 1 else "train.global_batch_size is 1",
    "data.prefetch_factor": lambda c: None if c.data.num_workers else "data.num_workers is 0",
    "train.min_lr_ratio": lambda c: None if c.train.schedule == "cosine" else f"train.schedule is {c.train.schedule}",
    "train.eval_every": _no_eval,
    "train.eval_batch_size": _no_eval,
    "train.eval_samples": _no_periodic_eval,
    "train.eval_generate": _no_answers,
    "train.max_new_tokens": _no_generation,
    "monitor.dead_alarm_steps": lambda c: None if c.moe else "there is no moe section",
    "monitor.heatmap_every": lambda c: _no_tensorboard(c) or (None if c.moe else "there is no moe section"),
    "monitor.sample_images": _no_samples,
}


# --- contradictions: each gives (key, complaint), the complaint None where all is well


def _one_of(first: str, second: str) -> Callable[[RunConfig], Complaint]:
    section, first_name, second_name = first.partition(".")[0], first.rpartition(".")[2], second.rpartition(".")[2]

    def rule(config: RunConfig) -> Complaint:
        a, b = getattr(getattr(config, section), first_name), getattr(getattr(config, section), second_name)
        if a is None and b is None:
            return section, f"neither {first} nor {second} is set; set one of them"
        if a is not None and b is not None:
            later = first if config.at(first).startswith("override ") else second
            return later, f"{first} is {a!r} and {second} is {b!r}; set only one of them"
        return section, None

    return rule


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


def _stage(config: RunConfig) -> Complaint:
    if config.train.stage == "all":
        return "train.stage", None
    if config.moe is None:
        return "train.stage", "train.stage router_only needs routers, and there is no moe section"
    kind = config.moe.router.kind
    text = f"train.stage router_only would train nothing: moe.router.kind {kind} learns nothing"
    return "train.stage", text if kind in ("hash", "balanced") else None


NONCAUSAL = (
    "moe.router.kind expert_choice makes a token's experts depend on later tokens: a causal language model trained so "
    "leaks the future and cannot generate; choose topk, or set moe.router.allow_noncausal to true to study it"
)


def _causal(config: RunConfig) -> Complaint:
    router = config.moe.router if config.moe else None
    if not isinstance(router, ExpertChoiceRouting):
        return "moe.router.kind", None
    if not router.allow_noncausal:
        return "moe.router.kind", NONCAUSAL
    generates = config.data.eval is not None and config.train.eval_generate
    text = "moe.router.kind expert_choice cannot generate answers; set train.eval_generate to false"
    return "train.eval_generate", text if generates else None


def _router_groups(config: RunConfig) -> Complaint:
    router = config.moe.router if config.moe else None
    if not isinstance(router, TopKRouting) or (router.groups is None) == (router.top_groups is None):
        return "moe.router", None
    there, lacking = ("groups", "top_groups") if router.top_groups is None else ("top_groups", "groups")
    text = f"moe.router.{there} is {getattr(router, there)} and moe.router.{lacking} is not set; set both or none"
    return f"moe.router.{there}", text


WITHOUT_EFFECT = {
    "hash": ("aux", "z_loss", "loss_free"),
    "balanced": ("aux", "z_loss", "loss_free"),
    "expert_choice": ("aux", "loss_free"),
}


def _balance_effect(config: RunConfig) -> Complaint:
    """Balancers that cannot change what this router does."""
    kind = config.moe.router.kind if config.moe else "topk"
    balances = [balance.kind for balance in config.moe.balance] if config.moe else []
    useless = next((balance for balance in balances if balance in WITHOUT_EFFECT.get(kind, ())), None)
    reason = "gives all experts the same load" if kind == "expert_choice" else "learns nothing"
    text = f"moe.balance {useless} would not be used: moe.router.kind {kind} {reason}; remove it"
    return "moe.balance", text if useless else None


def _warmup(config: RunConfig, steps: int | None) -> Complaint:
    warmup = config.train.warmup_steps
    text = f"train.warmup_steps {warmup} takes all of the run's {steps} steps; make it smaller"
    return "train.warmup_steps", text if steps is not None and warmup >= steps else None


def _flash_attention(config: RunConfig) -> Complaint:
    wrong = config.model.attention == "flash_attention_2" and config.train.precision == "fp32"
    text = "model.attention flash_attention_2 has no fp32 kernels; set train.precision to bf16 or attention to sdpa"
    return "model.attention", text if wrong else None


CONTRADICTIONS: list[Callable[[RunConfig], Complaint]] = [
    _one_of("model.path", "model.preset"),
    _one_of("train.steps", "train.epochs"),
    _dispatch,
    _balance,
    _balance_effect,
    _causal,
    _router_groups,
    _stage,
    *RL_CONTRADICTIONS,
    *LORA_CONTRADICTIONS,
    *GATE_CONTRADICTIONS,
    lambda config: _warmup(config, config.train.steps),
    _flash_attention,
]


# --- the run against its model: each gives any number of (key, complaint)

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
    if router.expert_dropout and top_k == 1 and not isinstance(router, ExpertChoiceRouting):
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
