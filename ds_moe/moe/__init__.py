"""The Mixture-of-Experts layer in plain PyTorch: route -> dispatch -> experts -> combine.

layer.py        the layer, which is these four steps; `MoELayer.build` makes one for loops without the trainer
in_block.py     the same around the experts of a family's own block
parts.py        its parts from keywords, for that use
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
from ds_moe.moe.balance import AuxLoss
from ds_moe.moe.decision import RoutingDecision
from ds_moe.moe.layer import MoELayer
from ds_moe.moe.routers import ROUTERS
from ds_moe.moe.routers.topk import TopKRouter
from ds_moe.moe.standalone import ExpertChoiceRouter, ExpertRouter, LoadBalancingLoss

__all__ = [
    "ROUTERS",
    "AuxLoss",
    "ExpertChoiceRouter",
    "ExpertParallel",
    "ExpertRouter",
    "LoadBalancingLoss",
    "MoELayer",
    "RoutingDecision",
    "TopKRouter",
]
