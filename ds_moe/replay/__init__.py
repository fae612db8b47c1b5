"""Routing replay: training with the experts that an inference engine used.

traces.py     decodes the routing that engines and rollout files give
align.py      finds the experts that each input token replays
record.py     records the experts that a model's own forwards use
ratios.py     log-probabilities, and ratios, corrections and KL made of them
objective.py  policy-gradient losses
metrics.py    figures of a reinforcement-learning step
"""

from ds_moe.replay.align import RoutingShape, align
from ds_moe.replay.objective import Objective, PolicyInputs, group_advantages, policy_loss
from ds_moe.replay.record import RoutingRecorder, joined
from ds_moe.replay.traces import RoutingTrace, decode, to_record

__all__ = ["Objective", "PolicyInputs", "RoutingRecorder", "RoutingShape", "RoutingTrace", "align", "decode"]
__all__ += ["group_advantages", "joined", "policy_loss", "to_record"]
