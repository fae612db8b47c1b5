"""Routing replay: training with the experts that an inference engine used.

traces.py     decodes the routing that engines and rollout files give
align.py      finds the experts that each input token replays
record.py     records the experts that a model's own forwards use
ratios.py     log-probabilities, and ratios, corrections and KL made of them
objective.py  policy-gradient losses
metrics.py    figures of a reinforcement-learning step
"""

from ds_moe.replay.align import RoutingShape, align, join, pack, pad
from ds_moe.replay.objective import Objective, PolicyInputs, group_advantages, policy_loss
from ds_moe.replay.record import RoutingRecorder, joined
from ds_moe.replay.traces import RoutingTrace, check_weights, decode, load_traces, save_traces, to_record, with_weights

__all__ = [
    "Objective",
    "PolicyInputs",
    "RoutingRecorder",
    "RoutingShape",
    "RoutingTrace",
    "align",
    "check_weights",
    "decode",
    "group_advantages",
    "join",
    "joined",
    "load_traces",
    "pack",
    "pad",
    "policy_loss",
    "save_traces",
    "to_record",
    "with_weights",
]
