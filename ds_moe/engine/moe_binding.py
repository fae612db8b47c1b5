"""All that this package knows about how DeepSpeed (0.19) sees an expert-parallel layer.

DeepSpeed's engine recognises expert layers by inheritance from `AutoEPMoELayer`, of which it uses `num_experts`,
`ep_size`, `ep_group_name` and `set_deepspeed_parallelism`. Attributes of the parameters tell it where they are placed.
The construction, router, experts and checkpoint code of `AutoEPMoELayer` are not used.
"""

from collections.abc import Callable

import deepspeed
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import Tensor, nn

from ds_moe.models.convert import LayerClasses
from ds_moe.moe.in_block import InBlock
from ds_moe.moe.layer import MoELayer


class _Bound(AutoEPMoELayer):
    """What DeepSpeed needs to know of a layer and its parameters."""

    def _bind(self) -> None:
        self.ep_size = self.dispatcher.ep.size
        self.ep_group_name = f"ep_size_{self.ep_size}"
        self.num_experts = self.load.num_experts
        for parameter in self.experts.parameters():
            parameter.allreduce = False
            parameter.group_name = parameter.ds_zero_partition_group_name = self.ep_group_name
            parameter.ds_zero_placement_family = "autoep_expert"

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, folding_group_handles: object = None
    ) -> None:
        """Create the groups unless they exist, and give the dispatcher its own. `deepspeed.initialize` calls this."""
        create_groups(self.ep_size)
        if self.ep_size > 1:
            self.dispatcher.ep.group = groups._get_expert_parallel_group(self.ep_group_name)


class BoundMoELayer(MoELayer, _Bound):
    """A `MoELayer` that DeepSpeed recognises."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self._bind()


class BoundInBlock(InBlock, _Bound):
    """An `InBlock` that DeepSpeed recognises."""

    def set_up(self, **kwargs: object) -> None:
        super().set_up(**kwargs)
        self._bind()


BOUND = LayerClasses(BoundMoELayer, BoundInBlock)


def create_groups(ep_size: int) -> None:
    """Create EP groups of consecutive ranks, and the expert-data-parallel groups across them, unless they exist."""
    if f"ep_size_{ep_size}" not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)


def zero3_home(model: nn.Module, ds_config: dict[str, object]) -> Callable[[nn.Parameter], tuple[Tensor, int]]:
    """Make a function that shards a parameter as ZeRO-3 expects it, without values.

    The function returns this rank's shard of the flattened parameter, which DeepSpeed may have padded at the end and
    which the caller fills, and the position in the parameter at which the shard begins. Experts are sharded over the
    ranks that hold the same ones. When `initialize` finds such parameters, it assumes that `zero.Init` made the model:
    it leaves them and all buffers where they are, and shards the other parameters itself.
    """
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=ds_config)
    # DeepSpeed copies the shard from a complete parameter, for which this is the memory. Nobody writes to it, and a CPU
    # gives no memory to pages that are never written.
    blank = torch.empty(max(one.nbytes for one in model.parameters()), dtype=torch.uint8, device=init.local_device)

    def home(parameter: nn.Parameter) -> tuple[Tensor, int]:
        if group_name := getattr(parameter, "ds_zero_partition_group_name", None):
            parameter.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(group_name)
        parameter.data = blank[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()
        shard = parameter.ds_tensor
        return shard, shard.numel() * parameter.ds_zero_partition_rank

    return home
