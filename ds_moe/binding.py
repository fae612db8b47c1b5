"""All we know about DeepSpeed's view of an expert-parallel layer, in one room (DeepSpeed 0.19).

DeepSpeed's engine recognises expert layers by inheritance from `AutoEPMoELayer` and reads only these from it:
`num_experts`, `ep_size`, `ep_group_name` and `set_deepspeed_parallelism`. Parameters carry their placement as
attributes. Its own construction, router, experts and checkpoint code are not used.
"""

from __future__ import annotations

from typing import Any

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import nn

from ds_moe.moe.layer import MoELayer


class BoundMoELayer(MoELayer, AutoEPMoELayer):
    """`MoELayer` as DeepSpeed expects to find it. ZeRO-3 treats it as a leaf: its parameters are gathered together."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ep_size = self.dispatcher.ep.size
        self.ep_group_name = f"ep_size_{self.ep_size}"
        self.num_experts = self.gate.weight.shape[0]
        for parameter in self.experts.parameters():
            _place_on_expert_ranks(parameter, self.ep_group_name)
        for module in (self.gate, self.shared):
            for parameter in module.parameters() if module is not None else ():
                parameter.ds_zero_placement_family = "replicated"

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, folding_group_handles: Any = None
    ) -> None:
        """Called by the engine during `initialize`: create the groups once and hand ours to the dispatcher."""
        create_groups(self.ep_size)
        if self.ep_size > 1:
            self.dispatcher.ep.group = groups._get_expert_parallel_group(self.ep_group_name)


def _place_on_expert_ranks(parameter: nn.Parameter, group_name: str) -> None:
    parameter.allreduce = False
    parameter.group_name = group_name
    parameter.ds_zero_placement_family = "autoep_expert"
    parameter.ds_zero_partition_group_name = group_name


def create_groups(ep_size: int) -> None:
    """EP groups of consecutive ranks and the expert-data-parallel groups across them (idempotent)."""
    if f"ep_size_{ep_size}" not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)
