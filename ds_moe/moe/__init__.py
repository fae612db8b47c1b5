"""The Mixture-of-Experts layer in plain PyTorch: route -> dispatch -> experts -> combine.

layer.py        the layer, which is these four steps
decision.py     the legend of shapes, and the routing decision
context.py      what all layers must know about the micro-batch
tape.py         lets a recompute repeat its forward's decision
routers/        turn hidden states into a decision
dispatch.py     moves rows to their experts and back
permute.py      moves rows on one rank, with gradients
all_to_all.py   moves rows between ranks, with gradients
experts.py      the expert weights that a rank owns
expert_lora.py  low-rank updates of these weights
backends/       kernels that multiply rows by expert
balance.py      losses that keep the experts evenly loaded
loss_free.py    a bias on the selection that does so without a loss
expert_load.py  counts the load for the monitor
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
from ds_moe.moe.routers import ROUTERS, Router
from ds_moe.moe.routers.topk import TopKRouter
from ds_moe.moe.standalone import ExpertChoiceRouter, ExpertRouter, LoadBalancingLoss, make_router
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
    "make_router",
]
