"""Collectives: bytes that one rank moves, and seconds on links of two speeds.

Rank r stands on node r // devices_per_node. EP groups are consecutive ranks; expert-data-parallel (EDP) groups hold the
ranks that own the same experts, `ep_size` apart; data parallelism (DP) takes all ranks. DeepSpeed builds them so.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from tools.step_model.costs import Topology
from tools.step_model.machines import Machine


@dataclass(frozen=True)
class Group:
    """`size` ranks; `neighbours` of them share a node with the worst placed one, itself included."""

    size: int
    neighbours: int

    @property
    def crosses(self) -> bool:
        return self.neighbours < self.size

    @property
    def remote(self) -> float:
        """Fraction of an all-to-all's rows that leave the node, evenly spread experts assumed."""
        return (self.size - self.neighbours) / self.size


def _group(groups: Iterable[range], devices_per_node: int) -> Group:
    nodes = [Counter(rank // devices_per_node for rank in ranks) for ranks in groups]
    return Group(nodes[0].total(), min(min(node.values()) for node in nodes))


@cache
def ep_group(topology: Topology) -> Group:
    starts = range(0, topology.world, topology.ep_size)
    return _group((range(start, start + topology.ep_size) for start in starts), topology.devices_per_node)


@cache
def edp_group(topology: Topology) -> Group:
    groups = (range(first, topology.world, topology.ep_size) for first in range(topology.ep_size))
    return _group(groups, topology.devices_per_node)


@cache
def dp_group(topology: Topology) -> Group:
    return _group([range(topology.world)], topology.devices_per_node)


def hops_s(collective: str, group: Group, machine: Machine, messages: float) -> float:
    """ceil(log2 n) hops for each of `messages` collectives, as trees and NCCL's PAT take."""
    latency_s = max(machine.link(collective).latency_s, machine.inter.latency_s if group.crosses else 0)
    return messages * math.ceil(math.log2(group.size)) * latency_s


def all_to_all_s(size: float, group: Group, machine: Machine, messages: float = 1) -> float:
    """`size` bytes of a rank, 1/n of them to each of n ranks, its own share staying; both links work at once."""
    if group.size == 1:
        return 0.0
    within = size * (group.neighbours - 1) / group.size / machine.link("all_to_all").bandwidth
    across = size * group.remote / machine.inter.bandwidth
    return max(within, across) + hops_s("all_to_all", group, machine, messages)


def gather_s(size: float, group: Group, machine: Machine, messages: float = 1, collective: str = "all_gather") -> float:
    """All-gather of `size` bytes in total, or their reduce-scatter: (n - 1) / n of them come in over a ring.

    A ring that crosses nodes enters a node once, over the links of all its members there together.
    """
    if group.size == 1:
        return 0.0
    moved = size * (group.size - 1) / group.size
    within = moved / machine.link(collective).bandwidth if group.neighbours > 1 else 0
    across = moved / (group.neighbours * machine.inter.bandwidth) if group.crosses else 0
    return max(within, across) + hops_s(collective, group, machine, messages)


def all_reduce_s(size: float, group: Group, machine: Machine, messages: float = 1) -> float:
    return 2 * gather_s(size, group, machine, messages, "all_reduce")
