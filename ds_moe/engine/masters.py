"""Reads and writes the fp32 master weights and Adam moments of a ZeRO engine, by parameter.

DeepSpeed keeps them in flat partitions, one for each group and rank. Reading and writing them by parameter makes our
checkpoints independent of ZeRO stage and world size. DeepSpeed gathers an expert parameter over the ranks that hold the
same experts, so a value here always has the experts of one EP rank.
"""

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from ds_moe.models.matrices import ADAM_MOMENTS, MUON_MOMENTS

WEIGHT = "weight"


def moments(trained: Tensor) -> tuple[str, ...]:
    """The moments of a trained parameter, or of a flat partition."""
    return MUON_MOMENTS if getattr(trained, "by_muon", False) else ADAM_MOMENTS


def is_stage3(engine: deepspeed.DeepSpeedEngine) -> bool:
    return isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3)


def _flat_masters(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    if is_stage3(engine):
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


def adam_step(engine: deepspeed.DeepSpeedEngine) -> int:
    """The number of steps that Adam has taken."""
    states = [engine.optimizer.optimizer.state.get(flat, {}) for flat in _flat_masters(engine)]
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def start_adam(engine: deepspeed.DeepSpeedEngine, step: int) -> None:
    """Give every flat partition zero moments and a step count, as if Adam had taken `step` steps.

    Each partition gets a `step` tensor of its own, because Adam would advance a shared one once for each partition.
    """
    if step == 0:
        return
    optimizer = engine.optimizer.optimizer
    counts_in_tensors = isinstance(optimizer, torch.optim.AdamW | torch.optim.Adam)
    for flat in _flat_masters(engine):
        state = optimizer.state[flat]
        # torch's fused Adam counts in a tensor beside the weights; DeepSpeed's count in integers.
        state["step"] = torch.tensor(float(step), device=flat.device) if counts_in_tensors else step
        for moment in moments(flat):
            state[moment] = torch.zeros_like(flat, dtype=torch.float32)
    if isinstance(optimizer, DeepSpeedCPUAdam):
        _count_up(optimizer, step)
    link_moments(engine)


def _count_up(optimizer: DeepSpeedCPUAdam, step: int) -> None:
    """Let DeepSpeed's C++ Adam count to `step` by updating one-element tensors.

    It computes beta^t in fp32, with one multiplication for each step. If it had to jump to a step it would compute a
    power, which rounds differently, and a resumed run would not be bit-equal.
    """
    group, scratch = optimizer.param_groups[0], [torch.zeros(1) for _ in range(4)]
    settings = (0.0, *group["betas"], group["eps"], 0.0, group["bias_correction"])
    for past in range(1, step + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, past, *settings, *scratch)


def link_moments(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make every parameter's moments readable at ZeRO 1 and 2.

    DeepSpeed 0.19 links moments to parameters only once, after the first step of the first group, when the other groups
    have no moments yet.
    """
    if not is_stage3(engine):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def read(parameter: nn.Parameter, kind: str) -> Tensor:
    """The full fp32 weight or moment of a parameter (collective over its ranks); a frozen weight keeps its dtype."""
    if not parameter.requires_grad:
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            return parameter.detach().clone()
    value = safe_get_full_fp32_param(parameter) if kind == WEIGHT else safe_get_full_optimizer_state(parameter, kind)
    return value.detach()


@torch.no_grad()
def write(parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    """Put a full weight or moment into this rank's partition; a weight also into the model's own parameter."""
    value = value.to(parameter.device)
    if parameter.requires_grad and hasattr(parameter, "ds_id"):
        _write_shard(parameter, kind, value)
    elif parameter.requires_grad and kind == WEIGHT:
        safe_set_full_fp32_param(parameter, value)
    elif parameter.requires_grad:
        safe_set_full_optimizer_state(parameter, value, kind)
    if kind == WEIGHT:
        write_weight(parameter, value)


@torch.no_grad()
def write_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Put a full weight into the model's own parameter alone, which is all that an engine without optimizer has."""
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(value)
        return
    piece = _own_piece(parameter, value)
    parameter.ds_tensor.data[: piece.numel()].copy_(piece)
    if parameter.data.numel() == parameter.ds_numel:  # DeepSpeed keeps small parameters gathered between steps
        parameter.data.copy_(value.view_as(parameter))


def _write_shard(parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    """The optimizer's part of `write` under ZeRO-3.

    DeepSpeed's setters of full values (0.19, `stage3.py`, `set_full_hp_param`) cut the piece out of the value without
    its padding. They raise on the last rank unless the number of ranks divides the tensor.
    """
    piece = _own_piece(parameter, value)
    padded = F.pad(piece, (0, parameter.ds_tensor.numel() - piece.numel()))
    if kind == WEIGHT:
        safe_set_local_fp32_param(parameter, padded)
    else:
        safe_set_local_optimizer_state(parameter, padded, kind)


def _own_piece(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """What this rank holds of a full value under ZeRO-3: a piece of the flattened tensor, equal on every rank but for
    the padding past the tensor's end, which is not in it."""
    size, rank = parameter.ds_tensor.numel(), parameter.ds_zero_partition_rank
    return value.flatten()[rank * size : (rank + 1) * size]
