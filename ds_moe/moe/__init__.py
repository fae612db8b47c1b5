"""The Mixture-of-Experts layer in plain PyTorch: route -> dispatch -> experts -> combine."""

from ds_moe.moe.balance import AuxLoss, Balancer
from ds_moe.moe.dispatch import AllToAllDispatcher, ExpertParallel, LocalDispatcher
from ds_moe.moe.experts import Experts
from ds_moe.moe.layer import MoELayer
from ds_moe.moe.routers import TopKRouter
from ds_moe.moe.routing import ForwardContext, RoutingDecision, checkpoint_contexts

__all__ = [
    "AllToAllDispatcher",
    "AuxLoss",
    "Balancer",
    "Experts",
    "ExpertParallel",
    "ForwardContext",
    "LocalDispatcher",
    "MoELayer",
    "RoutingDecision",
    "TopKRouter",
    "checkpoint_contexts",
]
