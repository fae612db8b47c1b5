"""From a model and a run's settings to a DeepSpeed engine: groups, parameter groups, and invariants before step 1."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import set_z3_leaf_modules, z3_leaf_module
from torch import Tensor, nn
from transformers import PreTrainedModel, get_scheduler

from ds_moe import ops
from ds_moe.binding import BoundMoELayer, create_groups, zero3_home
from ds_moe.config import RunConfig, TrainConfig
from ds_moe.errors import UserError
from ds_moe.gating.saved import start_gate
from ds_moe.models.convert import convert, load_expert_bias, moe_layers
from ds_moe.models.qwen3_vl import has_vision, keep_vision_in_step
from ds_moe.models.streaming import read_unread
from ds_moe.models.unread import is_unread
from ds_moe.models.weight_rows import WeightRows
from ds_moe.moe import ExpertParallel, ForwardContext, checkpoint_contexts
from ds_moe.trainable import set_trainable


@dataclass(frozen=True)
class Topology:
    """Where this process stands. `ep_size` consecutive ranks share one copy of the experts."""

    rank: int
    world_size: int
    local_rank: int
    ep_size: int
    device: torch.device

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep_size


def on_cpu() -> bool:
    return get_accelerator().device_name() == "cpu"


def start_distributed(ep_size: int) -> Topology:
    """Join the job the launcher started (or make one of a single process) and bind this process to its device.

    Raises:
        UserError: `ep_size` does not divide the number of processes.
    """
    ops.use_environment()
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    local_rank = int(os.environ["LOCAL_RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size % ep_size:
        raise UserError(
            f"moe.ep_size={ep_size} does not divide the {world_size} processes of this job; "
            f"start a multiple of {ep_size} or choose another moe.ep_size"
        )
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 warns about at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not on_cpu():
        get_accelerator().set_device(local_rank)
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)
    if on_cpu():
        _unlink_shared_memory()
    device = torch.device(get_accelerator().device_name(local_rank) if not on_cpu() else "cpu")
    return Topology(dist.get_rank(), dist.get_world_size(), local_rank, ep_size, device)


def _unlink_shared_memory() -> None:
    """Let the memory that DeepSpeed's ranks on CPUs share (66 MiB each, shm.cpp) end with them.

    DeepSpeed 0.19 never removes these files from /dev/shm: every process that ever ran would keep its part of memory.
    """
    dist.barrier()  # by now every rank has opened those of all others
    place = (str(os.getuid()), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], str(dist.get_rank()))
    Path("/dev/shm", "_".join(("deepspeed_allreduce_buffer", *place))).unlink(missing_ok=True)


def prepare_model(model: PreTrainedModel, config: RunConfig, topology: Topology) -> ForwardContext | None:
    """Freeze, convert or gate, and switch on gradient checkpointing; the forward context is None for a dense model."""
    context = None
    set_trainable(model, config)
    if config.task == "gate":
        start_gate(model, config.gate)
    if config.moe is not None:
        create_groups(topology.ep_size)
        ep = ExpertParallel(topology.ep_size, topology.ep_rank)
        context = convert(model, config.moe, ep, BoundMoELayer)
        if config.lora is not None and not config.lora.train_router:
            for layer in moe_layers(model):
                layer.gate.requires_grad_(False)  # what a router of ours learns beside the model's weight
        if config.model.path is not None:
            load_expert_bias(model, config.model.path)
    if has_vision(model) and config.task != "gate":  # a gate runs the vision tower itself
        keep_vision_in_step(model)
    if config.train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    return context


def read_weights(model: PreTrainedModel, config: RunConfig, topology: Topology, ds_config: dict[str, Any]) -> int:
    """Read what `load_model` left in its files into the memory where this rank keeps it: of the experts its own, and
    under ZeRO-3 its shards alone. Nothing happens to a model that is complete.

    Returns:
        Bytes read by this rank.
    """
    if not any(is_unread(parameter) for parameter in model.parameters()):
        return 0
    files = WeightRows.find(str(config.model.path))
    assert files is not None  # they are where they were
    sharded = ds_config["zero_optimization"]["stage"] == 3
    home = zero3_home(model, ds_config) if sharded else partial(_whole, topology.device)
    size = read_unread(model, files, ExpertParallel(topology.ep_size, topology.ep_rank), home)
    for buffer in model.buffers():  # DeepSpeed does not move those of a model that is sharded already
        buffer.data = buffer.data.to(topology.device)
    return size


def _whole(device: torch.device, parameter: nn.Parameter) -> tuple[Tensor, int]:
    """Memory for a parameter that is not sharded, see `streaming.Home`."""
    parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    return parameter.data.view(-1), 0


def parameter_groups(model: nn.Module, weight_decay: float, adapter_lr: float | None = None) -> list[dict[str, Any]]:
    """Optimizer groups in the form DeepSpeed wants: matrices decay, vectors do not, experts stand apart; with an
    `adapter_lr` also the adapters of a gated model."""
    adapters = {id(one) for one in model.adapter_bank.parameters()} if adapter_lr is not None else set()
    matrices, vectors, banked = [], [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))  # a sharded one is flat
            (banked if id(parameter) in adapters else matrices if dimensions > 1 else vectors).append(parameter)
    groups = [
        {"name": "matrices", "params": matrices, "weight_decay": weight_decay},
        {"name": "vectors", "params": vectors, "weight_decay": 0.0},
        {"name": "adapters", "params": banked, "weight_decay": weight_decay, "lr": adapter_lr},
    ]
    return [group for group in split_params_into_different_moe_groups_for_optimizer(groups) if group["params"]]


def scheduler_factory(config: TrainConfig, total_steps: int) -> Callable[[torch.optim.Optimizer], Any]:
    """Warm-up, then cosine (to `min_lr_ratio`), linear or constant, over `total_steps` optimizer steps."""
    kind, specific = config.schedule, {}
    if kind == "cosine" and config.min_lr_ratio > 0:
        kind, specific = "cosine_with_min_lr", {"min_lr_rate": config.min_lr_ratio}
    elif kind == "constant":
        kind = "constant_with_warmup"
    return lambda optimizer: get_scheduler(
        kind,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=specific,
    )


def build_engine(
    model: PreTrainedModel, config: RunConfig, ds_config: dict[str, Any], total_steps: int
) -> deepspeed.DeepSpeedEngine:
    """`deepspeed.initialize` around a prepared model, with our invariants checked afterwards.

    Raises:
        UserError: a combination DeepSpeed cannot train.
        RuntimeError: an invariant does not hold (a bug of ours, or a DeepSpeed we do not know).
    """
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    layers = moe_layers(model)
    experts = [parameter for layer in layers for parameter in layer.experts.parameters()]
    if layers and stage < 3 and not any(parameter.requires_grad for parameter in experts):
        raise UserError(
            "frozen experts (model.freeze, train.stage router_only, or lora without lora.experts) need ZeRO stage 3: "
            "choose ds_configs/zero3.json or train the experts"
        )
    if stage == 3 and layers:
        set_z3_leaf_modules(model, [BoundMoELayer])
    adapter_lr = config.gate.adapter_lr if config.task == "gate" else None
    groups = parameter_groups(model, config.train.weight_decay, adapter_lr)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups,
        config=ds_config,
        lr_scheduler=scheduler_factory(config.train, total_steps),
    )
    _check_invariants(engine, layers, grouped, stage)
    return engine


def _check_invariants(
    engine: deepspeed.DeepSpeedEngine, layers: list[BoundMoELayer], grouped: list[int], stage: int
) -> None:
    if stage in (1, 2) and not hasattr(engine.optimizer, "single_partition_of_fp32_groups"):
        raise RuntimeError(f"checkpoints cannot be written with DeepSpeed's {type(engine.optimizer).__name__}")
    trainable = {id(parameter): name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    if sorted(grouped) != sorted(trainable):
        lost = [name for key, name in trainable.items() if key not in set(grouped)]
        raise RuntimeError(f"every trainable parameter must be in exactly one optimizer group; lost: {lost[:5]}")
    for layer in layers:
        if stage == 3 and not z3_leaf_module(layer):
            raise RuntimeError(f"MoE layer {layer.index} is no ZeRO-3 leaf module: ranks would gather out of step")
        group = layer.dispatcher.ep.group if layer.ep_size > 1 else None
        if layer.ep_size > 1 and dist.get_world_size(group) != layer.ep_size:
            raise RuntimeError(f"MoE layer {layer.index} exchanges over {dist.get_world_size(group)} ranks")
        for parameter in layer.experts.parameters():
            if parameter.allreduce:
                raise RuntimeError(f"an expert of MoE layer {layer.index} would be averaged with other experts")
