"""Routing replay: the experts that an inference engine used, decoded, aligned, forced and weighed in an objective.

traces.py     forms of engines and files, decoded   align.py      experts of each input token
record.py     experts that our own forwards used    objective.py  policy-gradient losses
ratios.py     log-probs, ratios, corrections, KL    metrics.py    what an RL step is watched by
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
