"""Routing replay: the experts that an inference engine used, decoded, aligned, forced and weighed in an objective."""

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
