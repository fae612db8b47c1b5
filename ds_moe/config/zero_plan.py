"""What a run's DeepSpeed JSON says about where weights, gradients and optimizer state are kept, as typed values."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ZeroPlan:
    """How DeepSpeed shards and offloads the state of a run; `config.deepspeed.zero_plan` reads it.

    The defaults are DeepSpeed's own. Sizes are numbers of elements, which DeepSpeed also takes as floats (5e8).
    """

    stage: int  # 1 shards the optimizer state over the data-parallel ranks, 2 the gradients too, 3 the weights too
    offload_optimizer: bool = False  # the optimizer state is kept in host memory, and the gradients with it
    offload_param: bool = False  # the weights are kept in host memory (stage 3 only)
    reduce_bucket: float = 5e8  # gradients that DeepSpeed collects before it reduces them together
    sub_group: float = 1e9  # largest part of the optimizer state that stage 3 steps at once
    reuse_distance: float = 1e9  # stage 3 keeps a gathered weight that its trace uses again within so many elements
    max_live: float = 1e9  # gathered weights that stage 3 holds at most
    bf16: bool = False  # weights and gradients are bf16; else they are fp32
    overlaps: bool = False  # stages 1 and 2 fill a second bucket while the first is reduced
    fp32_sums: bool = False  # gradients of micro-batches are summed in fp32 (stages 2 and 3) although they are bf16

    @property
    def width(self) -> int:
        """Bytes of a weight or gradient."""
        return 2 if self.bf16 else 4

    @property
    def sum_width(self) -> int:
        """Bytes of a gradient that is summed over micro-batches."""
        return 4 if self.fp32_sums else self.width
