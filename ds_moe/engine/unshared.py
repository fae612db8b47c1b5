"""ZeRO-3 without the passes over memory that gradients need only where ranks share them.

An expert whose EP group spans all ranks has no replica: its gradient is complete when backward returns it. DeepSpeed
(0.19, `runtime/zero/stage3.py`) still copies it into a bucket, concatenates the bucket, divides, reduces over a group
of one rank and copies the result; of every gradient it makes an fp64 copy for the norm and a flat copy for Adam. The
optimizer class here writes such a gradient straight to where Adam reads it. Sums, scales and their order stay.
"""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.utils import get_norm_dtype
from torch import Tensor, nn

# A CPU reads a gradient in blocks whose fp64 copy stays in its cache; an accelerator converts while it sums.
NORM_BLOCK = 2**16  # elements


def spare_copies(engine: deepspeed.DeepSpeedEngine) -> None:
    """Change the class of a ZeRO-3 engine's optimizer in place; any other engine is left as it is."""
    if type(engine.optimizer) is DeepSpeedZeroOptimizer_Stage3:
        engine.optimizer.__class__ = Unshared


class Unshared(DeepSpeedZeroOptimizer_Stage3):
    """See this file's docstring. It holds nothing of its own."""

    @torch.no_grad()
    def reduce_independent_p_g_buckets_and_remove_grads(self, param: nn.Parameter) -> None:
        """Take a gradient out of a parameter, once backward has completed it.

        One without replicas goes to its buffer. The bucket of the others is no longer emptied where one of these comes
        between them, so that fewer and larger reductions are left.
        """
        ready = getattr(param, "ds_grad_is_ready", True)  # false while DeepSpeed tiles a module
        if dist.get_world_size(self._get_param_partition_group(param)) > 1 or not ready:
            super().reduce_independent_p_g_buckets_and_remove_grads(param)
            return
        buffer = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[param.ds_id]
        grad, share = param.grad.view(-1), 1 / self._gradient_averaging_world_size([param], 1)
        if not get_accelerator().resolves_data_dependency():
            self.reduce_and_partition_stream.wait_stream(get_accelerator().current_stream())
        with get_accelerator().stream(self.reduce_and_partition_stream):
            if self._goes_to_adam_at_once(param, buffer, grad):
                self._to_offloaded_adam(param, grad, share)
            elif self.offload_optimizer:  # moves it to the host, and at the end of a step to Adam
                self.partition_grads([param], [grad.mul_(share)])
            elif self.micro_step_id > 0:
                buffer.add_(grad, alpha=share)
            elif grad.dtype == buffer.dtype:
                torch.mul(grad, share, out=buffer)
            else:
                buffer.copy_(grad).mul_(share)
            if not get_accelerator().is_synchronized_device():
                grad.record_stream(get_accelerator().current_stream())
        param.grad = None

    def _goes_to_adam_at_once(self, param: nn.Parameter, buffer: Tensor, grad: Tensor) -> bool:
        """Whether the gradient is a whole step's, its optimizer in host memory, and no buffer would round it."""
        if not self.offload_optimizer or self.micro_step_id > 0 or not self.is_gradient_accumulation_boundary():
            return False
        group, _, _ = self.grad_position[self.get_param_id(param)]
        return buffer.dtype in (grad.dtype, torch.float32) and not self._swappable_optimizer_subgroup(group)

    def _to_offloaded_adam(self, param: nn.Parameter, grad: Tensor, share: float) -> None:
        """Write a gradient where the host's Adam reads it, and note its norm, without the stored copy between them."""
        self._offload_boundary_param_ids.add(param.ds_id)
        group, start, _ = self.grad_position[self.get_param_id(param)]
        target = self.fp32_partitioned_groups_flat[group].grad.narrow(0, start, grad.numel())
        if grad.dtype == target.dtype and grad.device == target.device:
            norm = _norm(torch.mul(grad, share, out=target))
        else:
            norm = _norm(grad.mul_(share))
            target.copy_(grad, non_blocking=True)
        self.norm_for_param_grads[self.get_param_id(param)] = norm

    def _constant_buffered_norm2(self, input: Tensor, buffer_size: int = 0) -> Tensor:
        """The norm of one gradient, of an optimizer that is offloaded."""
        return _norm(input)

    def get_grad_norm_direct(self, gradients: list[Tensor], params: list[nn.Parameter], norm_type: float = 2) -> Tensor:
        """The norm over all ranks. Of a tensor of one element, DeepSpeed takes the same norm as of the gradient whose
        norm that element is."""
        if norm_type != 2:
            return super().get_grad_norm_direct(gradients, params, norm_type)
        return super().get_grad_norm_direct([_norm(grad).view(1) for grad in gradients], params, norm_type)

    def _prepare_fp32_grad_for_sub_group(self, sub_group_id: int) -> None:
        """Let Adam read the gradients of a group where they are: beside each other, in one buffer."""
        grads, flat = self.averaged_gradients[sub_group_id], self.fp32_partitioned_groups_flat[sub_group_id]
        trained = all(param.requires_grad for param in self.fp16_groups[sub_group_id])
        if not trained or grads[0].dtype != flat.dtype or grads[0].device != flat.device:
            super()._prepare_fp32_grad_for_sub_group(sub_group_id)
            return
        start = grads[0].storage_offset()
        flat.grad = self.grad_partitions_flat_buffer.narrow(0, start, flat.numel())
        self.averaged_gradients[sub_group_id] = None

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor) -> None:
        """Spare the pass over the gradients where they are multiplied by 1."""
        clipped = self.clip_grad > 0 and float(total_norm) / self.loss_scale + 1e-6 > self.clip_grad
        if clipped or self.loss_scale != 1:
            super().unscale_and_clip_grads(sub_group_id, total_norm)


def _norm(grad: Tensor) -> Tensor:
    """The fp64 norm of a gradient; fp32 where an accelerator has no fp64."""
    dtype, flat = get_norm_dtype(), grad.view(-1)
    if flat.device.type != "cpu":
        return torch.linalg.vector_norm(flat, dtype=dtype)
    blocks = [torch.linalg.vector_norm(block.to(dtype)) for block in flat.split(NORM_BLOCK)]
    return torch.linalg.vector_norm(torch.stack(blocks))
