"""The parts of a layer outside of the trainer, made and checked from keywords.

Names, defaults and ranges of settings are those of a run file. What is no such setting or of another type is a
`TypeError`, what is out of range a `ValueError`, each one line with the name, the value and what is allowed.
"""

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import TypeVar, get_args

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ds_moe.config.moe import PLAIN, ROUTINGS, AuxBalance, LossFreeBalance, ZLossBalance
from ds_moe.config.sections import Section
from ds_moe.moe.backends import BACKENDS, Recompute
from ds_moe.moe.balance import BALANCERS, Balancer
from ds_moe.moe.experts import ACTIVATIONS, Experts
from ds_moe.moe.loss_free import LossFreeBalancing
from ds_moe.moe.routers import ROUTERS, Router

# How a balance is asked for: True: with a run file's defaults; a number: its weight, or the rate of a bias; its keys;
# None, False or 0: not at all.
BalanceSetting = bool | float | Mapping[str, object] | None
_Section = TypeVar("_Section", bound=Section)


def make_router(kind: str, weight_ED: nn.Parameter, top_k: int, **settings: object) -> Router:
    """The router that `moe.router` of a run file with this kind and these settings would make.

    Args:
        kind: a key of `ROUTERS`.
        weight_ED: the router matrix, which becomes this module's `weight`.
        settings: arguments of the kind's class; those left out have the defaults of run files, and the weights of a
            token sum to 1.
    """
    defaults = ROUTINGS[kind]().settings({**PLAIN, "top_k": top_k})
    return ROUTERS[kind](weight_ED, **(defaults | settings))


def router_from(
    kind: str, weight_ED: nn.Parameter, top_k: int, settings: Mapping[str, object], normalizes: bool
) -> Router:
    """`make_router` for settings that are not checked yet; `normalizes`: the default of what its weights sum to."""
    routing = _checked(ROUTINGS[one_of("router", kind, ROUTINGS)], settings, f"router {kind}")
    weight_ED.requires_grad_(routing.learns)
    return ROUTERS[kind](weight_ED, **routing.settings({**PLAIN, "normalize": normalizes, "top_k": top_k}))


def balancers_from(router: str, **balances: BalanceSetting) -> list[Balancer]:
    """The balancers of a layer: `aux` and `z_loss`; and a complaint about each balance that its router cannot use."""
    routing = ROUTINGS[router]
    for kind, asked in balances.items():
        if kind in routing.useless_balances and _wanted(asked):
            reason = "gives all experts the same load" if routing.learns else "learns nothing"
            raise ValueError(f"{kind} would not be used: router {router} {reason}; leave it out")
    sections = {"aux": AuxBalance, "z_loss": ZLossBalance}
    found = [_balance(section, "weight", balances[kind]) for kind, section in sections.items()]
    return [BALANCERS[one.kind](**one.model_dump(exclude={"kind"})) for one in found if one is not None]


def bias_from(num_experts: int, loss_free: BalanceSetting) -> LossFreeBalancing | None:
    found = _balance(LossFreeBalance, "update_rate", loss_free)
    return None if found is None else LossFreeBalancing(num_experts, **found.model_dump(exclude={"kind"}))


def experts_from(
    dim: int, width: int, experts: int, *, activation: str, backend: str, recompute: Recompute | None
) -> Experts:
    one_of("activation", activation, ACTIVATIONS)
    one_of("backend", backend, ("auto", *BACKENDS))
    if backend == "liger" and activation != "silu":
        raise ValueError(f"backend='liger' computes activation='silu' only, not {activation!r}; use another backend")
    if recompute is not None:
        one_of("recompute", recompute, get_args(Recompute))
        if activation != "silu" or backend in ("reference", "liger"):
            by = f"backend={backend!r}" if activation == "silu" else f"activation={activation!r}"
            raise ValueError(f"recompute={recompute!r} would not be used with {by}; leave it out")
    matrices = new_weight(experts, 2 * width, dim), new_weight(experts, dim, width)
    return Experts(*matrices, backend, recompute=recompute or "act", activation=activation)


class SharedExpert(nn.Module):
    """An expert that every token uses: gated like the others, under transformers' names."""

    def __init__(self, dim: int, width: int, activation: str = "silu") -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.up_proj = nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)
        self.activation = activation

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x_TD)) * self.up_proj(x_TD))


def shared_from(dim: int, shared: int | nn.Module | None, activation: str) -> nn.Module | None:
    if shared is None or isinstance(shared, nn.Module):
        return shared
    whole(shared=shared)
    return SharedExpert(dim, shared, activation)


def new_weight(*shape: int) -> nn.Parameter:
    """Normal, so that products with inputs of unit variance have unit variance too."""
    return nn.Parameter(torch.empty(shape).normal_(std=shape[-1] ** -0.5))


def whole(**numbers: object) -> None:
    """Raise unless each is a whole number above 0."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}={value!r} must be a whole number")
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} must be text: one of {', '.join(allowed)}")
    if value not in (known := list(allowed)):
        raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
    return value


def check_states(x: Tensor, mask: Tensor | None, weight_ED: Tensor) -> None:
    """Raise unless a layer with this router matrix takes these hidden states, (B, S, D) or (T, D), and this mask."""
    if not isinstance(x, Tensor) or not isinstance(mask, Tensor | None):
        found = f"{type(x).__name__} and {type(mask).__name__}"
        raise TypeError(f"hidden states and mask must be tensors (or no mask), are {found}")
    if not x.is_floating_point():
        raise TypeError(f"hidden states are {x.dtype}, not floats (an embedding turns ids into hidden states)")
    if torch.promote_types(x.dtype, weight_ED.dtype) != weight_ED.dtype:
        raise TypeError(f"hidden states are {x.dtype}, wider than the layer's {weight_ED.dtype}; convert one of them")
    dim = weight_ED.shape[1]
    if x.dim() not in (2, 3) or x.shape[-1] != dim:
        raise ValueError(f"hidden states {tuple(x.shape)} must be (B, S, {dim}) or (T, {dim})")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(f"mask {tuple(mask.shape)} must be {tuple(x.shape[:-1])}, one entry a token")


def _wanted(asked: BalanceSetting) -> bool:
    return asked is not None and not (isinstance(asked, int | float) and asked == 0)


def _balance(section: type[_Section], main: str, asked: BalanceSetting) -> _Section | None:
    if not _wanted(asked):
        return None
    keys = {} if asked is True else asked if isinstance(asked, Mapping) else {main: asked}
    return _checked(section, keys, section.model_fields["kind"].default)


def _checked(section: type[_Section], keys: Mapping[str, object], noun: str) -> _Section:
    known = [name for name in section.model_fields if name not in ("kind", "top_k", "allow_noncausal")]
    if strange := [key for key in keys if key not in known]:
        raise TypeError(f"{noun} has no setting {strange[0]!r}; it has {', '.join(known)}")
    try:
        return section(**keys)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
    reason = detail["msg"].replace("Input should be", "must be")
    wrong = TypeError if detail["type"].endswith("_type") else ValueError
    raise wrong(f"{noun}: {detail['loc'][0]}={detail['input']!r} {reason}")
