"""The Mixture-of-Experts layer in plain PyTorch: route -> dispatch -> experts -> combine."""

from ds_moe.moe.all_to_all import ExpertParallel
from ds_moe.moe.balance import AuxLoss, Balancer, Seen, ZLoss
from ds_moe.moe.context import ForwardContext
from ds_moe.moe.decision import RoutingDecision
from ds_moe.moe.dispatch import AllToAllDispatcher, LocalDispatcher
from ds_moe.moe.experts import Experts
from ds_moe.moe.layer import MoELayer
from ds_moe.moe.loss_free import LossFreeBalancing
from ds_moe.moe.routers import ROUTERS, Router, TopKRouter
from ds_moe.moe.standalone import ExpertChoiceRouter, ExpertRouter, LoadBalancingLoss
from ds_moe.moe.tape import checkpoint_contexts

__all__ = [
    "ROUTERS",
    "AllToAllDispatcher",
    "AuxLoss",
    "Balancer",
    "ExpertChoiceRouter",
    "ExpertParallel",
    "ExpertRouter",
    "Experts",
    "ForwardContext",
    "LoadBalancingLoss",
    "LocalDispatcher",
    "LossFreeBalancing",
    "MoELayer",
    "Router",
    "RoutingDecision",
    "Seen",
    "TopKRouter",
    "ZLoss",
    "checkpoint_contexts",
]
