"""Routers: hidden states in, a `RoutingDecision` out. A new kind is one class and one line in `ROUTERS`.

base.py           score -> select -> weigh          topk.py    each token chooses its experts
expert_choice.py  each expert chooses its tokens    fixed.py   nothing is learned: hash, balanced
limits.py         expert dropout and capacity
"""

from ds_moe.moe.routers.base import Router
from ds_moe.moe.routers.expert_choice import ExpertChoice
from ds_moe.moe.routers.fixed import BalancedRouter, HashRouter
from ds_moe.moe.routers.topk import NoisyTopKRouter, TopKRouter

ROUTERS: dict[str, type[Router]] = {
    "topk": TopKRouter,
    "noisy_topk": NoisyTopKRouter,
    "expert_choice": ExpertChoice,
    "hash": HashRouter,
    "balanced": BalancedRouter,
}

__all__ = ["ROUTERS", "BalancedRouter", "ExpertChoice", "HashRouter", "NoisyTopKRouter", "Router", "TopKRouter"]
