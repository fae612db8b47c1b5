"""The Mixture-of-Experts layer in plain PyTorch: route -> dispatch -> experts -> combine.

layer.py        the layer: these four steps        decision.py     what a router decides; the legend of shapes
routers/        hidden states -> a decision        context.py      what all layers know of the micro-batch in flight
tape.py         a recompute repeats its decision   dispatch.py     rows to their experts and back
permute.py      rows moved on one rank             all_to_all.py   rows moved between ranks
experts.py      the weights a rank owns            backends/       kernels that multiply rows by expert
expert_lora.py  low-rank updates of experts        balance.py      losses that keep the load even
loss_free.py    a bias that keeps it even          expert_load.py  what the monitor sees of the load
standalone.py   routers and losses for use without the trainer
"""

from ds_moe.moe.all_to_all import ExpertParallel
from ds_moe.moe.balance import AuxLoss, Balancer, TokenStats, ZLoss
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
    "TokenStats",
    "TopKRouter",
    "ZLoss",
    "checkpoint_contexts",
]
